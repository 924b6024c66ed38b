"""The policy server on CUDA, without Ray: are its log-probabilities right, before and after a swap in flight, and how
fast does it answer beside the bare engine?

    python -m benchmarks.gpu.server [--dtype bfloat16]

The tiny default model. The reference is the Hugging Face model in float32 with the same weights (in bf16 runs, with
weights rounded to bf16). A swap is made while answers are under way; each of these must be split into a span of the old
and one of the new version. The bare engine is asked in the same process, for answers of the same lengths, with as many
requests in flight.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from actors.settings import ModelSettings, PolicyServerSettings
from benchmarks.gpu.card import arguments, finish, in_process, print_table
from benchmarks.gpu.learner import make_model

IN_FLIGHT = 64
SECONDS = 6.0


def launched(policy: ModelSettings, settings: PolicyServerSettings) -> Any:
    """How a policy server starts in this process, whose environment is made that of one."""
    from actors.serving.policy_engine import PolicyServerLaunch, policy_server_environment

    launch = PolicyServerLaunch(index=0, run_seed=1, temp_folder=tempfile.mkdtemp(prefix="v"))
    os.environ.update(policy_server_environment(policy, settings, launch))
    return launch


def served(model: str, device: str, dtype: str, work: str) -> dict[str, Any]:
    """All figures, in a process that becomes the policy server."""
    policy = ModelSettings(path=model, dtype=dtype)
    settings = PolicyServerSettings(
        device=device, max_model_len=512, gpu_memory_utilization=0.1, kv_cache_bytes=1 << 30
    )
    return asyncio.run(measured(policy, settings, launched(policy, settings), Path(work)))


async def measured(policy: Any, settings: Any, launch: Any, work: Path) -> dict[str, Any]:
    from actors.serving.policy_server import PolicyServer
    from learner.publish import SharedMemoryPublisher

    begun = time.monotonic()
    server = PolicyServer(policy, settings, launch)
    await server.ready()
    figures: dict[str, Any] = {"start_s": round(time.monotonic() - begun, 1)}
    first = await server.generate_batch([request(seed, 40) for seed in range(32)])
    again = await server.generate_batch([request(seed, 40) for seed in range(32)])
    figures["batch_repeats_itself"] = all(
        a.response_ids.tobytes() == b.response_ids.tobytes() for a, b in zip(first, again, strict=True)
    )
    figures["before_swap"] = differences(policy.path, policy.dtype, settings.device, first)
    publisher = SharedMemoryPublisher(f"gpu-benchmark-{os.getpid()}", work)
    changed, tensors = changed_weights(policy, work)
    update = publisher.publish(1, tensors.items())
    running = [asyncio.create_task(server.generate(request(100 + index, 400))) for index in range(8)]
    await asyncio.sleep(0.2)
    report = await server.load(update)
    spans = [[version for version, _ in answer.version_spans] for answer in await asyncio.gather(*running)]
    fresh = await server.generate_batch([request(seed, 40) for seed in range(32)])
    figures |= {
        "swap_s": report.seconds,
        "swap_parts_s": dict(report.parts),
        "held_as_given": report.held,
        "answers_split_by_the_swap": sum(each == [0, 1] for each in spans),
        "answers_in_flight": len(spans),
        "after_swap": differences(changed, policy.dtype, settings.device, fresh),
        "stale_would_be": differences(policy.path, policy.dtype, settings.device, fresh),
    }
    publisher.close()
    figures |= await rates(server)
    shut_down(server)
    return figures


def shut_down(server: Any) -> None:
    """End the engine, and not this process with it, as the server would where an engine dies."""
    loop = asyncio.get_running_loop()
    for process in multiprocessing.active_children():
        loop.remove_reader(process.sentinel)
    server._engine.shutdown()


def request(seed: int, tokens: int, temperature: float = 1.0) -> Any:
    import numpy as np

    from actors.generation import GenerationRequest
    from actors.images import encode_png, image_hash
    from benchmarks.gpu.steps import PROMPT

    picture = np.random.default_rng(seed % 16).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return GenerationRequest(PROMPT, image_hash(picture), encode_png(picture), temperature, tokens, seed)


def differences(model: str, dtype: str, device: str, answers: list[Any]) -> dict[str, float]:
    """|log-probability of the engine - of the Hugging Face model in float32| over all tokens, and the KL it means."""
    import numpy as np
    import torch
    from transformers import AutoModelForImageTextToText

    from actors.chat import ChatProcessor
    from actors.images import decode_png
    from benchmarks.gpu.steps import PROMPT

    chat = ChatProcessor(model)
    vlm = AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, dtype)).float().to(device).eval()
    found = []
    for seed, answer in enumerate(answers):
        inputs = chat.encode_prompt(PROMPT, decode_png(request(seed, 1).png))
        ids = torch.tensor(np.concatenate([inputs["input_ids"][0].numpy(), answer.response_ids]))[None]
        inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits = vlm(**{name: value.to(device) for name, value in inputs.items()}).logits[0].float()
        logits[:, list(chat.banned_token_ids)] = -torch.inf
        before = len(ids[0]) - len(answer.response_ids) - 1
        logs = logits[before:-1].log_softmax(-1).cpu()
        chosen = logs.gather(-1, torch.tensor(answer.response_ids, dtype=torch.int64)[:, None])[:, 0].numpy()
        found.append(answer.logprobs - chosen)
    apart = np.concatenate(found)
    return {
        "mean": float(np.abs(apart).mean()),
        "largest": float(np.abs(apart).max()),
        "kl": float((np.expm1(-apart) + apart).mean()),
        "tokens": len(apart),
    }


def changed_weights(policy: Any, work: Path) -> tuple[str, dict[str, Any]]:
    """Other weights: a model folder that has them, and its tensors by name."""
    import shutil

    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(f"{policy.path}/model.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    torch.manual_seed(1)
    dtype = getattr(torch, policy.dtype)
    state = {name: (value + 0.03 * torch.randn_like(value)).to(dtype) for name, value in state.items()}
    folder = work / "changed"
    shutil.copytree(policy.path, folder, dirs_exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder), state


async def rates(server: Any) -> dict[str, Any]:
    """Tokens per second of the server, and of its engine asked directly for answers of the same lengths."""
    from actors.images import decode_png
    from benchmarks.rollouts import measure_bare

    lengths: list[int] = []
    over = False

    async def ask(slot: int) -> None:
        seed = slot
        while not over:
            answer = await server.generate(request(seed, 200))
            lengths.append(len(answer.response_ids))
            seed += IN_FLIGHT

    tasks = [asyncio.create_task(ask(slot)) for slot in range(IN_FLIGHT)]
    await asyncio.sleep(2.0)
    before, begun = sum(lengths), time.monotonic()
    await asyncio.sleep(SECONDS)
    ours = (sum(lengths) - before) / (time.monotonic() - begun)
    over = True
    await asyncio.gather(*tasks)
    prompt = server._chat.prompt_ids(request(0, 1).prompt)
    requests = [
        ({"prompt_token_ids": prompt}, decode_png(request(seed, 1).png), length)
        for seed, length in enumerate(lengths[: 4 * IN_FLIGHT])
    ]
    bare = await measure_bare(server._engine, requests, IN_FLIGHT, SECONDS)
    return {
        "tokens_per_s": ours,
        "bare_engine_tokens_per_s": bare["tokens_per_s"],
        "share_of_bare": ours / bare["tokens_per_s"],
        "in_flight": IN_FLIGHT,
        "mean_answer_tokens": sum(lengths) / len(lengths),
    }


def main() -> None:
    settings = arguments(__doc__, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as work:
        in_process(make_model, f"{work}/model")
        figures = in_process(served, f"{work}/model", settings.device, settings.dtype, work)
    print_table(
        "log-probabilities of the engine against float32, nats",
        [{"when": when, **figures[when]} for when in ("before_swap", "after_swap", "stale_would_be")],
    )
    finish("server", settings, {"dtype": settings.dtype, **figures})


if __name__ == "__main__":
    main()
