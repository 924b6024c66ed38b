"""What the learner leaves for policy servers: which weights, where, and for whom to read."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


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


def test_weights_go_to_the_object_store_in_parts_and_not_at_all_where_it_is_too_small(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load

    from actors.serving.weight_transfer import WeightTransferError
    from learner import publish

    weights = {f"weight {index}": torch.full((100,), float(index)) for index in range(5)}  # 400 bytes each
    weights["large"] = torch.ones(1000)
    monkeypatch.setattr(publish, "PART_BYTES", 1000)
    update = publish.ObjectStorePublisher().publish(1, weights.items())
    parts = [load(part.tobytes()) for part in ray_cluster.get(list(update.refs))]
    assert [sorted(part) for part in parts] == [
        ["weight 0", "weight 1"], ["weight 2", "weight 3"], ["weight 4"], ["large"]
    ]  # fmt: skip
    assert all(torch.equal(tensor, weights[name]) for part in parts for name, tensor in part.items())
    assert update.checksums.keys() == weights.keys()

    assert publish._object_store_bytes() > 100 << 20
    monkeypatch.setattr(publish, "_object_store_bytes", lambda: 10 << 20)
    several = [(f"weight {index}", torch.zeros(1 << 18)) for index in range(4)]
    with pytest.raises(
        WeightTransferError, match=r"are 4 MiB, .* has 10 MiB\. It has to have 12, 3 times .*cluster.object_store_bytes"
    ):
        publish.ObjectStorePublisher().publish(1, several)
