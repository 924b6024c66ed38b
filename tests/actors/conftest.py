"""One small model and one live policy server for all tests of this folder: an engine takes half a minute to start."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROMPT = "The current number is in the picture. Answer in JSON."
ANSWER = '{"thoughts": "the current number is 3 and the target number is 5", "action": "+"}'


@pytest.fixture(scope="package")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Idefics3 with tied head, tokenizer and processor."""
    from learner.supervised.default_model import make_default_vlm
    from tests.tiny_models import SMALL

    folder = tmp_path_factory.mktemp("tiny_vlm")
    make_default_vlm(folder, [PROMPT, ANSWER], [picture(seed) for seed in range(4)], SMALL, seed=0)
    return folder


@pytest.fixture(scope="package")
def policy_server(ray_cluster: Any, tiny_vlm: Path) -> Iterator[LiveServer]:
    from actors.serving.policy_engine import PolicyServerLaunch, policy_server_environment
    from actors.serving.policy_server import PolicyServer
    from actors.serving.weight_transfer import WeightRegistry
    from actors.settings import ModelSettings, PolicyServerSettings

    with tempfile.TemporaryDirectory(prefix="coso-", dir="/tmp") as temp_folder:
        model = ModelSettings(path=str(tiny_vlm))
        settings = PolicyServerSettings(max_model_len=512, max_concurrent_requests=16, generate_deadline_s=60.0)
        # A run's seed may be larger than those that the engine takes.
        launch = PolicyServerLaunch(index=0, run_seed=2**32 + 1, temp_folder=temp_folder)
        environment = policy_server_environment(model, settings, launch)
        registry = ray_cluster.remote(WeightRegistry).options(num_cpus=0).remote()
        actor = (
            ray_cluster.remote(PolicyServer)
            .options(max_restarts=-1, num_cpus=1, runtime_env={"env_vars": environment})
            .remote(model, settings, launch, registry)
        )
        server = LiveServer(actor, registry, temp_folder)
        server.ask("ready", deadline_s=200)
        yield server
        ray_cluster.kill(actor)


class LiveServer:
    """The server's handles, and calls that wait for their answers."""

    def __init__(self, actor: Any, registry: Any, temp_folder: str) -> None:
        self.actor, self.registry, self.temp_folder = actor, registry, temp_folder
        self.last_version = 0

    def ask(self, method: str, *arguments: Any, deadline_s: float = 60.0) -> Any:
        import ray

        return ray.get(getattr(self.actor, method).remote(*arguments), timeout=deadline_s)

    def next_version(self) -> int:
        self.last_version += 1
        return self.last_version

    def sync(self, update: Any, sending: Sequence[Any] = ()) -> Any:
        """As the controller does it: first onto the registry, then to the server."""
        import ray

        from learner.publish import sync_servers

        update = ray.get(self.registry.put.remote(update), timeout=30)
        return sync_servers({"policy server 0": self.actor}, update, 60.0, sending)["policy server 0"]

    def restart(self, update: Any) -> None:
        """Kill the server, and let it come back with an update that has been published."""
        import ray

        ray.get(self.registry.put.remote(update), timeout=30)
        status = self.ask("status")
        ray.kill(self.actor, no_restart=False)
        for pid in (status["pid"], *status["engine_pids"]):
            wait_until_gone(pid)  # the process may still answer in the moment after
        assert self.wait_for_restart()["version"] == update.version

    def wait_for_restart(self, deadline_s: float = 150.0) -> Any:
        """What `ready` answers once Ray has started the actor again."""
        import ray

        deadline = time.monotonic() + deadline_s
        while True:
            try:
                return self.ask("ready", deadline_s=deadline - time.monotonic())
            except ray.exceptions.RayActorError:
                time.sleep(0.5)


def picture(seed: int) -> np.ndarray:
    """uint8 (48, 64, 3)"""
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def request(seed: int, *, temperature: float = 0.0, max_new_tokens: int = 24, prompt: str = PROMPT) -> Any:
    from actors.generation import GenerationRequest
    from actors.images import PngEncoder

    key, png = PngEncoder().encode(picture(seed))
    return GenerationRequest(prompt, key, png, temperature, max_new_tokens, seed)


def wait_until_gone(pid: int, deadline_s: float = 15.0) -> None:
    """Return when no process has this id; raise TimeoutError past the deadline."""
    import psutil

    try:
        psutil.Process(pid).wait(deadline_s)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired:
        os.kill(pid, signal.SIGKILL)
        raise TimeoutError(f"process {pid} outlived its policy server by {deadline_s} s") from None


class Reference:
    """The same model in Hugging Face transformers: what the engine must agree with."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText

        from actors.chat import ChatProcessor

        self.chat = ChatProcessor(str(folder))
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder).float().eval()

    def perturb(self, seed: int) -> Reference:
        """Other weights, reproducibly, far enough away that stale ones cannot pass for them."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.06)
        return self

    def weights(self) -> list[tuple[str, Any]]:
        """As the learner would publish them: by checkpoint name, the tied head left out."""
        from contextlib import nullcontext

        from learner.policy.weight_export import checkpoint_weights

        return list(checkpoint_weights(self.model, lambda parameters: nullcontext()))

    def distributions(self, question: Any, response_ids: np.ndarray) -> np.ndarray:
        """float64 (n, V): log-probabilities of every token before each of the response's."""
        import torch

        from actors.images import decode_png

        inputs = self.chat.encode_prompt(question.prompt, decode_png(question.png))
        prompt_length = inputs["input_ids"].shape[1]
        ids = torch.cat([inputs["input_ids"], torch.tensor(response_ids.tolist())[None]], dim=1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, prompt_length - 1 : -1].double()
        logits[:, self.chat.banned_token_ids] = -torch.inf
        return torch.log_softmax(logits / (question.temperature or 1.0), dim=-1).numpy()

    def logprobs(self, question: Any, response_ids: np.ndarray) -> np.ndarray:
        """float64 (n,) of the response's own tokens."""
        rows = self.distributions(question, response_ids)
        return rows[np.arange(len(response_ids)), response_ids]


@pytest.fixture()
def reference(tiny_vlm: Path) -> Reference:
    return Reference(tiny_vlm)
