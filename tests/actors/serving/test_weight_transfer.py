"""New weights in a live engine: right by every transport, without losing a request, and without leaving anything."""

from __future__ import annotations

import os
import re
import signal
import time
import weakref
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
        from learner.publish import make_publisher

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


def test_only_two_versions_stay_in_shared_memory_each_with_its_own_weights(tmp_path: Path) -> None:
    """The oldest file is written over: what it holds then is the new version's, and the one before stays as it is."""
    import torch
    from safetensors.torch import load_file

    from learner.publish import SharedMemoryPublisher

    def weights(version: int) -> dict[str, torch.Tensor]:
        return {
            "scalar": torch.tensor(version),
            "half": torch.full((3,), version, dtype=torch.bfloat16),
            "transposed": (torch.arange(6.0).reshape(2, 3) * version).T,
        }

    publisher = SharedMemoryPublisher(f"test-{tmp_path.name}", tmp_path)
    updates = []
    for version in (1, 2, 3, 10, 11):
        updates.append(publisher.publish(version, weights(version).items()))
        for update in updates[-2:]:
            stored = load_file(update.path)
            assert stored.keys() == weights(update.version).keys()
            for name, expected in weights(update.version).items():
                assert stored[name].dtype == expected.dtype and torch.equal(stored[name], expected)
    assert [os.path.exists(update.path) for update in updates] == [False, False, False, True, True]
    publisher.publish(13, weights(13).items())
    publisher.publish(13, weights(13).items())
    assert os.path.exists(updates[-1].path)
    publisher.close()
    assert not any(os.path.exists(update.path) for update in updates)


def test_a_file_left_by_a_run_of_the_same_name_is_replaced_where_its_tensors_are_others(tmp_path: Path) -> None:
    """As a run leaves one that was killed and goes on in another precision, or with another model."""
    import torch
    from safetensors.torch import load_file

    from learner.publish import SharedMemoryPublisher

    first = {"same": torch.arange(4), "cast": torch.ones(3), "reshaped": torch.ones(2, 3), "gone": torch.ones(2)}
    second = {
        "same": torch.arange(4) + 1,
        "cast": torch.full((3,), 2.0).bfloat16(),
        "reshaped": torch.full((3, 2), 3.0),
    }
    third = second | {"new": torch.zeros(1), "cast": torch.full((3,), 4.0).half()}  # as wide as bfloat16
    publisher = SharedMemoryPublisher(f"test-{tmp_path.name}", tmp_path)
    for weights in (first, second, third, third):
        path = str(publisher.publish(1, weights.items()).path)
        stored = load_file(path)
        assert stored.keys() == weights.keys()
        for name, expected in weights.items():
            assert stored[name].dtype == expected.dtype and torch.equal(stored[name], expected)
        assert os.stat(path).st_mode & 0o777 == 0o600
    for version, weights in ((2, third), (3, first)):  # and the oldest of two, in place of which the third one goes
        path = str(publisher.publish(version, weights.items()).path)
    assert load_file(path).keys() == first.keys()
    assert not os.path.exists(path.replace("-3.safetensors", "-1.safetensors"))
    publisher.close()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"coso-test-{tmp_path.name}-")]


def test_weights_go_to_the_folder_when_shared_memory_is_full_and_fail_when_both_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    import torch

    from actors.serving.weight_transfer import WeightTransferError
    from learner import publish

    usage = namedtuple("usage", "total used free")
    free = {str(publish.SHARED_MEMORY): 1000, str(tmp_path): 1 << 30}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1 << 40, 0, free[str(place)]))
    publisher = publish.SharedMemoryPublisher("test-full", tmp_path)
    update = publisher.publish(1, [("weight", torch.zeros(8))])
    assert Path(update.path or "").parent == tmp_path
    free[str(tmp_path)] = 2000
    with pytest.raises(WeightTransferError, match=re.escape(str(tmp_path))):
        publisher.publish(2, [("weight", torch.zeros(8))])
    publisher.close()
    assert not list(tmp_path.iterdir())


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


def test_gloo_learner_without_engines_gives_up_at_the_deadline() -> None:
    from actors.serving.weight_transfer import WeightTransferError
    from learner.publish import CollectivePublisher

    publisher = CollectivePublisher("gloo")
    publisher.open(engines=1, workers_per_engine=1, address="127.0.0.1", deadline_s=1.0)
    with pytest.raises(WeightTransferError, match="within 1 s"):
        publisher.connect()


def test_a_learner_that_broadcasts_holds_one_tensor_at_a_time() -> None:
    """Both to announce and to send them; what was announced is what is sent, in its order."""
    import gc

    import torch

    from learner.publish import CollectivePublisher

    made: list[weakref.ref[torch.Tensor]] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(6):
            gc.collect()
            assert sum(tensor() is not None for tensor in made) <= 1  # the one before is let go with the next
            tensor = torch.full((2, 3), float(index)).T.to(torch.bfloat16 if index % 2 else torch.float32)
            made.append(weakref.ref(tensor))
            yield f"weight {index}", tensor

    class Receiver:
        device = torch.device("cpu")
        received: list[tuple[str, tuple[int, ...], float]] = []

        def broadcast(self, tensor: torch.Tensor) -> None:
            assert tensor.is_contiguous()
            self.received.append((str(tensor.dtype), tuple(tensor.shape), float(tensor[0, 0])))

    publisher = CollectivePublisher("gloo")
    publisher._group = Receiver()
    update = publisher.publish(1, weights())
    publisher.send(weights())
    announced = [(f"torch.{dtype}", shape) for dtype, shape in zip(update.dtypes, update.shapes, strict=True)]
    assert update.names == tuple(f"weight {index}" for index in range(6)) == tuple(update.checksums)
    assert Receiver.received == [(*each, float(index)) for index, each in enumerate(announced)]


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


def test_only_this_user_can_read_the_weights_in_shared_memory(tmp_path: Path) -> None:
    import stat

    import torch

    from learner import publish

    publisher = publish.SharedMemoryPublisher(f"test-{tmp_path.name}", tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    # Another user of the machine may have put a link where the file is written.
    planted = publish.SHARED_MEMORY / f"coso-test-{tmp_path.name}-1.partial"
    planted.symlink_to(victim)
    mask = os.umask(0)
    try:
        for version in (1, 2, 3, 4):  # from the third on, files are written over
            path = Path(str(publisher.publish(version, [("w", torch.zeros(3))]).path))
            assert stat.S_IMODE(path.stat().st_mode) == 0o600 and not path.is_symlink()
        assert victim.read_text() == "mine"
    finally:
        os.umask(mask)
        publisher.close()
