"""Broadcasts between GPUs, as far as a machine without NCCL can show.

A stub stands for vLLM's communicator, and torch's functions for the current GPU and its stream are replaced: so these
tests show what the communicator is told and what becomes of its failures, not that NCCL works.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.serving.broadcast_groups import NcclGroup, join_group, within
from actors.serving.weight_transfer import WeightTransferError
from learner.publish import CollectivePublisher, _free_port


class Communicator:
    """A stub of vLLM's `PyNcclCommunicator`: each rank's broadcasts go through a list in this process."""

    connected: list[Communicator] = []
    sent: list[torch.Tensor] = []
    hang = threading.Event()  # while it is not set, whoever waits for it hangs as NCCL does
    fail_rank: int | None = None
    disabled = False

    def __init__(self, unique_id: bytes, rank: int, device: torch.device) -> None:
        self.unique_id, self.rank, self.device, self.destroyed = unique_id, rank, device, False
        self.broadcasts = 0

    @classmethod
    def from_unique_id_bytes(cls, unique_id: bytes, rank: int, world_size: int, device: torch.device) -> Communicator:
        # vLLM's warm-up: a tensor on `device`, whose device then has an index, is compared with `device`.
        assert device == torch.device("cuda", 0), f"made for {device}, but the tensor is on cuda:0"
        if rank == cls.fail_rank:
            raise RuntimeError("NCCL error: unhandled system error")
        if cls.fail_rank is not None:
            cls.hang.wait(60)
        cls.connected.append(cls(unique_id, rank, device))
        return cls.connected[-1]

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        if self.broadcasts >= len(self.sent) and self.rank != src:
            self.hang.wait(60)
        if self.rank == src:
            self.sent.append(tensor.clone())
        else:
            tensor.copy_(self.sent[self.broadcasts])
        self.broadcasts += 1

    def destroy(self) -> None:
        self.destroyed = True


@pytest.fixture(autouse=True)
def nccl(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.distributed.device_communicators import pynccl, pynccl_wrapper

    library = SimpleNamespace(ncclGetUniqueId=lambda: SimpleNamespace(internal=bytes(range(128))))
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", lambda: library)
    monkeypatch.setattr(pynccl, "PyNcclCommunicator", Communicator)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(Communicator, "connected", [])
    monkeypatch.setattr(Communicator, "sent", [])
    monkeypatch.setattr(Communicator, "hang", threading.Event())
    yield
    Communicator.hang.set()


def connected(deadline_s: float) -> tuple[CollectivePublisher, NcclGroup]:
    """A learner, and the one worker of one engine."""
    publisher = CollectivePublisher("nccl")
    group = publisher.open(engines=1, workers_per_engine=1, address="127.0.0.1", deadline_s=deadline_s)
    with ThreadPoolExecutor() as threads:
        worker = threads.submit(
            join_group, group.transport, group.address, group.port, group.first_rank(0), group.world_size, deadline_s
        )
        threads.submit(publisher.connect).result()
        return publisher, worker.result()


def test_the_communicator_is_made_for_the_current_gpu_by_its_index() -> None:
    connected(deadline_s=20.0)
    assert sorted(each.rank for each in Communicator.connected) == [0, 1]
    assert {each.device for each in Communicator.connected} == {torch.device("cuda", 0)}
    assert {each.unique_id for each in Communicator.connected} == {bytes(range(128))}


def test_weights_of_any_dtype_arrive_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    publisher, worker = connected(deadline_s=20.0)
    weights = {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([1.5, -2.0]).bfloat16(),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False]),
    }
    update = publisher.publish(1, weights.items())
    publisher._group.device = torch.device("cpu")  # where this machine's tensors are
    publisher.send(weights.items())
    for name, dtype, shape in zip(update.names, update.dtypes, update.shapes, strict=True):
        received = torch.empty(shape, dtype=getattr(torch, dtype))
        worker.broadcast(received)
        assert torch.equal(received, weights[name])


def test_a_rank_that_fails_leaves_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 fails where the others are waiting for it already: they give up at the deadline."""
    monkeypatch.setattr(Communicator, "fail_rank", 0)
    publisher = CollectivePublisher("nccl")
    group = publisher.open(engines=1, workers_per_engine=1, address="127.0.0.1", deadline_s=1.0)
    with ThreadPoolExecutor() as threads:
        worker = threads.submit(join_group, group.transport, group.address, group.port, 1, group.world_size, 1.0)
        with pytest.raises(WeightTransferError, match="rank 0 of 2 did not connect .*unhandled system error"):
            threads.submit(publisher.connect).result()
        with pytest.raises(WeightTransferError, match=r"rank 1 of 2 did not connect .*no answer in time"):
            worker.result(timeout=10)


def test_a_learner_that_no_engine_joins_gives_up_at_the_deadline() -> None:
    with pytest.raises(WeightTransferError, match="rank 0 of 2 did not connect"):
        NcclGroup("127.0.0.1", _free_port("127.0.0.1"), 0, 2, 1.0)


def test_a_broadcast_that_never_ends_is_given_up_and_the_communicator_ended() -> None:
    _, worker = connected(deadline_s=20.0)
    worker._deadline_s = 0.2
    with pytest.raises(WeightTransferError, match=r"failed at rank 1: no answer in time\. Connect learner and servers"):
        worker.broadcast(torch.empty(3))
    assert [each.destroyed for each in Communicator.connected if each.rank == 1] == [True]


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(TimeoutError, match="its own"):
        within(5.0, lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    assert within(5.0, lambda: 3) == 3
