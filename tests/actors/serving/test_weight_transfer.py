"""New weights in a live engine: right by every transport, without losing a request, and without leaving anything."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.trajectory import TrajectoryBatch
from cluster.config.files import validate
from cluster.errors import CosoError
from cluster.run.sync_check import SyncCheck
from tests.actors.conftest import PROMPT, LiveServer, Reference, request, wait_until_gone


class Learner:
    """Rank 0 of a learner as far as weight sync sees it, in a process of its own (a Ray actor class)."""

    def __init__(self, transport: Any, model: Path, folder: Path) -> None:
        from learner import publish
        from learner.publish import make_publisher

        publish.PART_BYTES = 100_000  # so that the small model's weights are several objects
        self.publisher: Any = make_publisher(transport, run=f"test-{folder.name}", fallback_folder=folder)
        self.model = model

    def publish(self, version: int, seed: int) -> Any:
        self.reference = Reference(self.model).perturb(seed)
        return self.publisher.publish(version, self.reference.weights())

    def open(self) -> Any:
        return self.publisher.open(engines=1, workers_per_engine=1, address="127.0.0.1", deadline_s=30.0)

    def connect(self) -> None:
        self.publisher.connect()

    def send(self) -> None:
        self.publisher.send(self.reference.weights())

    def close(self) -> None:
        self.publisher.close()


def assert_serves(server: LiveServer, reference: Reference) -> None:
    """Greedy answers and their log-probabilities are those of a fresh Hugging Face forward pass."""
    for seed in (21, 22):
        question = request(seed)
        answer = server.ask("generate", question)
        rows = reference.distributions(question, answer.response_ids)
        np.testing.assert_array_equal(answer.response_ids, rows.argmax(axis=1))
        np.testing.assert_allclose(answer.logprobs, rows.max(axis=1), atol=1e-4)
        assert answer.version_spans == [(server.last_version, 0)]


@pytest.mark.parametrize("transport", ["shared_memory", "object_store", "gloo"])
def test_a_live_engine_serves_pushed_weights(
    policy_server: LiveServer, reference: Reference, ray_cluster: Any, tiny_vlm: Path, tmp_path: Path, transport: str
) -> None:
    from learner.publish import connect_servers

    learner = ray_cluster.remote(Learner).options(num_cpus=0).remote(transport, tiny_vlm, tmp_path)
    seed = 30 + len(transport)
    question = request(21)
    before = policy_server.ask("generate", question)  # fills the prefix, image and encoder caches
    if transport == "gloo":
        group = ray_cluster.get(learner.open.remote(), timeout=60)
        connect_servers([("policy server 0", policy_server.actor)], group, learner.connect.remote())
    update = ray_cluster.get(learner.publish.remote(policy_server.next_version(), seed), timeout=60)
    assert len(update.refs) > 1 or transport != "object_store"
    report = policy_server.sync(update, [learner.send.remote()] if transport == "gloo" else ())
    assert report.version == policy_server.last_version and 0 < report.seconds < 30
    assert sum(report.parts.values()) == pytest.approx(report.seconds)
    assert report.held >= 0.9 * len(update.checksums)  # not the kernel of the first convolution, which vLLM reshapes
    reference.perturb(seed)
    assert np.abs(reference.logprobs(question, before.response_ids) - before.logprobs).max() > 0.1
    assert_serves(policy_server, reference)
    ray_cluster.get(learner.close.remote(), timeout=30)
    ray_cluster.kill(learner)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"coso-test-{tmp_path.name}-")]


def test_requests_in_flight_go_on_under_the_new_weights(
    policy_server: LiveServer, tiny_vlm: Path, tmp_path: Path, ray_cluster: Any
) -> None:
    """None is lost, and every token has the log-probability that the weights of its version give it."""
    from learner.publish import SharedMemoryPublisher

    old, new = Reference(tiny_vlm).perturb(41), Reference(tiny_vlm).perturb(42)
    publisher = SharedMemoryPublisher(f"test-{tmp_path.name}", tmp_path)
    old_version, new_version = policy_server.next_version(), policy_server.next_version()
    policy_server.sync(publisher.publish(old_version, old.weights()))
    update = publisher.publish(new_version, new.weights())
    # Asked before, and longer than a block of the engine's KV cache: what a cached prompt's image is needed for again.
    long_prompt = " ".join([PROMPT] * 10)
    questions = [request(seed, temperature=1.0, max_new_tokens=300, prompt=long_prompt) for seed in range(12)]
    for question in questions:
        policy_server.ask("generate", replace(question, max_new_tokens=1))
    pending = [policy_server.actor.generate.remote(question) for question in questions]
    deadline = time.monotonic() + 30
    while policy_server.ask("status")["running"] < len(questions) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    policy_server.sync(update)
    answers = ray_cluster.get(pending, timeout=60)
    publisher.close()

    crossed = 0
    for question, answer in zip(questions, answers, strict=True):
        versions = [version for version, _ in answer.version_spans]
        starts = [start for _, start in answer.version_spans] + [len(answer.response_ids)]
        assert starts[0] == 0 and versions in ([old_version], [new_version], [old_version, new_version])
        crossed += len(versions) == 2
        for version, start, end in zip(versions, starts[:-1], starts[1:], strict=True):
            expected = (old if version == old_version else new).logprobs(question, answer.response_ids)
            np.testing.assert_allclose(answer.logprobs[start:end], expected[start:end], atol=2e-3)
    assert crossed > 0


class ProbedEngine:
    """A live engine and the learner's weights, as the controller's sync check sees them."""

    def __init__(self, server: LiveServer, tiny_vlm: Path, folder: Path) -> None:
        from learner.publish import SharedMemoryPublisher

        config = validate({"rollout": {"temperature": 1.0, "max_new_tokens": 24}})
        self.server, self.tiny_vlm = server, tiny_vlm
        self.check = SyncCheck(config)
        self.publisher = SharedMemoryPublisher(f"test-{folder.name}", folder)

    def reference(self, seed: int | None) -> Reference:
        """The weights of the model's folder, or those moved by an update."""
        reference = Reference(self.tiny_vlm)
        return reference if seed is None else reference.perturb(seed)

    def publish(self, version: int, weights: list[tuple[str, Any]]) -> Any:
        return self.publisher.publish(version, weights)

    def load(self, weights: list[tuple[str, Any]]) -> tuple[Any, Any]:
        update = self.publish(self.server.next_version(), weights)
        return update, self.server.sync(update)

    def close(self) -> None:
        self.publisher.close()

    def judge(self, learner: Reference) -> dict[str, float]:
        if not self.check.requests:
            self.check.choose(self.batch())
        answers = self.server.ask("generate_batch", self.check.requests)
        asked = [*self.check.requests, *self.check.requests]
        rows = self.check.rows(answers)
        logprobs = [
            learner.logprobs(question, ids).astype(np.float32)
            for question, ids in zip(asked, rows.ragged("response_ids", np.int32), strict=False)
        ]
        metrics = self.check.judge("policy server 0", self.server.last_version, answers, logprobs)
        self.check.choose(self.batch())
        return metrics

    def batch(self) -> TrajectoryBatch:
        questions = [request(seed, temperature=1.0) for seed in range(2)]
        answers = self.server.ask("generate_batch", questions)
        return TrajectoryBatch.from_rows(
            [
                {"prompt": question.prompt, "image": question.image, "behaviour_logprobs": answer.logprobs}
                for question, answer in zip(questions, answers, strict=True)
            ],
            {question.image: question.png for question in questions},
        )


@pytest.fixture
def probed(policy_server: LiveServer, tiny_vlm: Path, tmp_path: Path) -> Iterator[ProbedEngine]:
    with closing(ProbedEngine(policy_server, tiny_vlm, tmp_path)) as engine:
        yield engine


def test_a_load_that_was_skipped_partial_or_left_a_cache_stale_stops_the_run(
    policy_server: LiveServer, probed: ProbedEngine
) -> None:
    """Against one live engine: by checksums where tensors did not arrive, by what it holds where only some did, by
    uncertain tokens where they all did."""
    from actors.serving.weight_transfer import WeightTransferError, check_received

    old, new = probed.reference(61), probed.reference(62)
    update, report = probed.load(old.weights())
    check_received(update, report.checksums, "policy server 0")
    assert probed.judge(old)["sync_check/mean_difference"] < 1e-3

    # Skipped: the server reports success, but its engine has the weights and checksums of before.
    published = probed.publish(policy_server.last_version + 1, new.weights())
    with pytest.raises(WeightTransferError, match="did not load weights version .* tensors are missing or differ"):
        check_received(published, report.checksums, "policy server 0")
    with pytest.raises(CosoError, match="stale"):
        probed.judge(new)

    # A stale cache: all tensors arrive, but the output head's packed copy keeps the old ones. The engine answers as one
    # with the old tied embedding does, so such a one is loaded.
    head = "embed_tokens.weight"
    stale = [(name, dict(old.weights())[name] if name.endswith(head) else tensor) for name, tensor in new.weights()]
    assert any(name.endswith(head) for name, _ in stale)
    probed.load(stale)
    with pytest.raises(CosoError, match="stale"):
        probed.judge(new)

    probed.load(new.weights())
    row = probed.judge(new)
    assert row["sync_check/mean_difference"] < 1e-3 < row["sync_check/previous_difference"]

    # Partial: only some of the tensors are in the file that the engine reads. It holds older ones besides, and says so.
    some = [(name, tensor) for name, tensor in new.weights() if "layers.1" not in name]
    assert 0 < len(some) < len(new.weights())
    with pytest.raises(WeightTransferError, match=r"holds others in \d+ places \([^)]*layers\.1"):
        probed.load(some)
    with pytest.raises(WeightTransferError, match="will not answer until it is restarted"):
        policy_server.ask("generate", request(0))
    policy_server.restart(probed.publish(policy_server.next_version(), new.weights()))
    assert_serves(policy_server, new)


def test_a_server_refuses_weights_that_are_not_those_announced(tmp_path: Path) -> None:
    import torch

    from actors.serving.weight_transfer import WeightTransferError, check_received, tensor_checksum
    from learner.publish import SharedMemoryPublisher

    weights = {"a": torch.arange(9000.0).reshape(90, 100), "b": torch.zeros(3, dtype=torch.bfloat16)}
    publisher = SharedMemoryPublisher(f"test-{tmp_path.name}", tmp_path)
    update = publisher.publish(1, weights.items())
    publisher.close()
    sums = dict(update.checksums)
    check_received(update, sums, "policy server 0")
    others = {
        "one element": weights["a"] + (torch.arange(9000).reshape(90, 100) == 4711),
        "transposed": weights["a"].T,
        "precision": weights["a"].bfloat16(),
        "none": torch.zeros(90, 100),
    }
    for name, other in others.items():
        with pytest.raises(WeightTransferError, match=r"1 of 2 tensors are missing or differ \(a\)"):
            check_received(update, sums | {"a": tensor_checksum(other)}, f"policy server 0 {name}")
    for received in (None, {}, {"b": sums["b"]}, sums | {"c": 0}):
        with pytest.raises(WeightTransferError, match="did not load"):
            check_received(update, received, "policy server 0")


def test_anonymous_files_are_readable_by_path_and_gone_afterwards() -> None:
    from actors.serving.weight_transfer import anonymous_file

    data = np.arange(1 << 20, dtype=np.uint8)
    with anonymous_file(data) as path:
        assert Path(path).read_bytes() == data.tobytes()
    assert not os.path.exists(path)


def test_weights_of_another_node_are_refused_before_the_engine_is_touched(
    policy_server: LiveServer, tmp_path: Path
) -> None:
    from actors.serving.weight_transfer import WeightTransferError, WeightUpdate

    elsewhere = WeightUpdate(version=99, transport="shared_memory", path=str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(WeightTransferError, match="object_store"):
        policy_server.ask("load", elsewhere)
    assert len(policy_server.ask("generate", request(1)).response_ids)


def test_a_dead_server_is_named_when_the_deadline_passes(
    policy_server: LiveServer, ray_cluster: Any, tmp_path: Path
) -> None:
    from actors.serving.policy_engine import PolicyServerLaunch
    from actors.serving.policy_server import PolicyServer
    from actors.serving.weight_transfer import WeightUpdate
    from actors.settings import ModelSettings, PolicyServerSettings
    from learner.publish import sync_servers

    launch = PolicyServerLaunch(index=3, run_seed=0, temp_folder=policy_server.temp_folder)
    dead = ray_cluster.remote(PolicyServer).options(num_cpus=0).remote(ModelSettings(), PolicyServerSettings(), launch)
    ray_cluster.kill(dead)
    update = WeightUpdate(version=1, transport="shared_memory", path=str(tmp_path / "weights.safetensors"))
    with pytest.raises(TimeoutError, match="policy server 3"):
        sync_servers({"policy server 3": dead}, update, deadline_s=2.0)


def test_a_server_whose_engine_is_killed_comes_back_with_current_weights(
    policy_server: LiveServer, ray_cluster: Any, tiny_vlm: Path, tmp_path: Path
) -> None:
    from learner.publish import SharedMemoryPublisher

    reference = Reference(tiny_vlm).perturb(51)
    publisher = SharedMemoryPublisher(f"test-{tmp_path.name}", tmp_path)
    policy_server.sync(publisher.publish(policy_server.next_version(), reference.weights()))
    before = policy_server.ask("status")
    batch = [request(seed, temperature=1.0) for seed in range(4)]
    sampled = policy_server.ask("generate_batch", batch)
    pending = policy_server.actor.generate.remote(request(1, temperature=1.0, max_new_tokens=400))
    os.kill(before["engine_pids"][0], signal.SIGKILL)
    with pytest.raises(ray_cluster.exceptions.RayActorError):
        ray_cluster.get(pending, timeout=30)
    after = policy_server.wait_for_restart()
    assert after["pid"] != before["pid"] and after["version"] == policy_server.last_version
    assert (before["last_failure"], after["last_failure"]) == ("", "the vLLM engine died")
    assert_serves(policy_server, reference)
    # Its engine has another seed now (`engine_seed`). Answers of a batch come from the seeds of the requests alone.
    assert after["incarnation"] == before["incarnation"] + 1
    for one, other in zip(sampled, policy_server.ask("generate_batch", batch), strict=True):
        assert one.response_ids.tobytes() == other.response_ids.tobytes()
    publisher.close()


def test_a_killed_server_leaves_no_process_and_no_shared_memory(policy_server: LiveServer) -> None:
    """Killed by the system, as for memory: neither Ray nor the server itself can then end the engine."""
    status = policy_server.ask("ready", deadline_s=150)
    pids = [status["pid"], *status["engine_pids"]]
    # By inode, since libc maps a semaphore before it gives it its name.
    inodes = {
        int(line.split()[4])
        for pid in pids
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "/dev/shm/" in line
    }
    os.kill(status["pid"], signal.SIGKILL)
    for pid in pids:
        wait_until_gone(pid)
    assert not [entry.name for entry in os.scandir("/dev/shm") if entry.inode() in inodes]
