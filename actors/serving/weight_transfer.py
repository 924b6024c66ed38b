"""How new weights travel from the learner to live policy servers: the message, its transports and the registry.

Every transport ends in the same call, `PolicyServer.load(update)`; they differ in how the bytes get there:

    shared_memory   a safetensors file in the node's memory, read by the engine where it lies
    object_store    the bytes of several such files through Ray's object store, for servers on other nodes
    gloo, nccl      a broadcast from the learner into the engines; gloo on CPUs, nccl on GPUs (`broadcast_groups`)

Engines receive with `actors.serving.weight_backends`, which runs inside vLLM's workers; the learner sends with
`learner.publish`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.settings import Transport

if TYPE_CHECKING:
    from torch import Tensor

COLLECTIVE_TRANSPORTS = frozenset({"gloo", "nccl"})
#: Positions within a tensor that its checksum tells apart.
CHECKSUM_COLUMNS = 4096


class WeightTransferError(RuntimeError):
    """An engine could not load new weights."""


@dataclass(frozen=True)
class WeightUpdate:
    """Weights of one version, or where to read them. Names are those of the Hugging Face checkpoint."""

    version: int  # > 0; a server starts at 0 with the weights of its model folder
    transport: Transport
    path: str | None = None  # shared_memory: a safetensors file on the servers' node
    refs: tuple[Any, ...] = ()  # object_store: ObjectRefs of uint8 arrays, each the bytes of a safetensors file
    names: tuple[str, ...] = ()  # collectives: what is broadcast, in this order
    dtypes: tuple[str, ...] = ()  # collectives: torch dtype names, "float32"
    shapes: tuple[tuple[int, ...], ...] = ()  # collectives
    checksums: Mapping[str, int] = field(default_factory=dict)  # of every tensor, see `tensor_checksum`


@dataclass(frozen=True)
class LoadReport:
    """A server's answer once it serves new weights."""

    seconds: float  # how long it paused generation
    parts: Mapping[str, float]  # seconds of each part of that
    version: int
    checksums: Mapping[str, int] | None = None  # of the tensors that the engine's loader was given
    held: int | None = None  # tensors that the engine was seen to hold as given; None where that is not looked at


@dataclass(frozen=True)
class CollectiveGroup:
    """The process group for broadcasts: the learner is rank 0, the workers of every engine are the other ranks."""

    transport: Transport  # gloo or nccl
    address: str  # of the rendezvous, where rank 0 listens
    port: int
    engines: int  # policy servers
    workers_per_engine: int  # each server's tensor parallel size
    deadline_s: float  # for the rendezvous, and for each broadcast

    @property
    def world_size(self) -> int:
        return 1 + self.engines * self.workers_per_engine

    def first_rank(self, engine: int) -> int:
        """Rank of the first worker of an engine: each independent engine has a range of its own."""
        return 1 + engine * self.workers_per_engine

    def as_seen_by(self, engine: int) -> dict[str, Any]:
        """The fields of `weight_backends.GroupInfo`."""
        return {
            "transport": self.transport,
            "master_address": self.address,
            "master_port": self.port,
            "rank_offset": self.first_rank(engine),
            "world_size": self.world_size,
            "deadline_s": self.deadline_s,
        }


class WeightRegistry:
    """Remembers the latest update, so that a restarted server receives the current weights, and counts the starts of
    each server. A Ray actor class."""

    def __init__(self) -> None:
        self._latest: WeightUpdate | None = None
        self._starts: Counter[int] = Counter()

    async def put(self, update: WeightUpdate) -> WeightUpdate:
        """Remember `update` and return it in the form in which servers should receive it.

        Bytes in the object store are stored again under this actor's ownership: Ray deletes an object when the process
        that stored it dies, and the learner may die.
        """
        if update.refs:
            import ray

            update = replace(update, refs=tuple([ray.put(np.asarray(await ref)) for ref in update.refs]))
        self._latest = update
        return update

    async def count_start(self, server: int) -> int:
        """Count a start of the server with this index; returns how often it was started before."""
        before = self._starts[server]
        self._starts[server] += 1
        return before

    async def latest(self) -> WeightUpdate | None:
        """The update that servers should be serving; None before the first."""
        return self._latest


def tensor_checksum(tensor: Tensor) -> int:
    """A 64-bit sum over the tensor's elements as integers, each weighted by its position modulo `CHECKSUM_COLUMNS`.

    It reads the memory once on the tensor's own device, and other dtypes or orders of the same numbers differ in it.
    """
    import torch

    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().reshape(-1).view(as_integers)
    rows, rest = divmod(len(bits), CHECKSUM_COLUMNS)
    columns = bits[: len(bits) - rest].reshape(rows, CHECKSUM_COLUMNS).sum(0, dtype=torch.int64)
    columns[:rest] += bits[len(bits) - rest :]
    return int((columns * torch.arange(1, CHECKSUM_COLUMNS + 1, device=columns.device)).sum())


def checksummed(named_tensors: Iterable[tuple[str, Tensor]], checksums: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """The same pairs; writes the checksum of each into `checksums` as it passes."""
    for name, tensor in named_tensors:
        checksums[name] = tensor_checksum(tensor)
        yield name, tensor


def check_received(update: WeightUpdate, received: Mapping[str, int] | None, server: str) -> None:
    """Raise `WeightTransferError` if a server's engine was not given exactly the tensors of `update`.

    received: see `LoadReport.checksums`.
    """
    received = received or {}
    wrong = [name for name, checksum in update.checksums.items() if received.get(name) != checksum]
    wrong += [name for name in received if name not in update.checksums]
    if wrong:
        raise WeightTransferError(
            f"{server} did not load weights version {update.version} as published: {len(wrong)} of "
            f"{len(update.checksums)} tensors are missing or differ ({', '.join(wrong[:3])}{', …' * (len(wrong) > 3)})"
        )


def check_held(update: WeightUpdate, wrong: Sequence[str], server: str) -> None:
    """Raise `WeightTransferError` if a server's engine holds something else than it was given; wrong: where, as
    `actors.serving.held_weights` found it."""
    if wrong:
        raise WeightTransferError(
            f"{server} was given weights version {update.version} but holds others in {len(wrong)} places "
            f"({', '.join(wrong[:3])}{', …' * (len(wrong) > 3)})"
        )


@contextmanager
def anonymous_file(data: np.ndarray) -> Iterator[str]:
    """The path of a file in memory that holds `data` (uint8) for the length of the block.

    The file has no name in any folder and ends with this process, so nothing can be left behind. Other processes of the
    same user open it through /proc.
    """
    descriptor = os.memfd_create("coso-weights")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(np.ascontiguousarray(data).data)
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def check_readable(update: WeightUpdate) -> None:
    """Raise `WeightTransferError` if the update's file is not on this node."""
    if update.path is not None and not Path(update.path).exists():
        raise WeightTransferError(
            f"weights version {update.version} are not at {update.path} on this node ({os.uname().nodename}). "
            "Servers on other nodes than the learner's need weight_sync.transport object_store or nccl."
        )
