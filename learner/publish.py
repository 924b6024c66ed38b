"""The learner's end of weight sync: makes each version's weights available, and the driver's call that waits for every
server to serve them.

    publisher = make_publisher(transport, ...)                       # in the learner's rank 0
    update = publisher.publish(version, named_tensors)               # there
    sending = <publisher.send(named_tensors) under way, if the transport broadcasts>
    sync_servers(servers, update, deadline_s, sending)               # in the driver

Tensors go by the names of the Hugging Face checkpoint, tied ones once (see `learner.policy.weight_export`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from actors.serving.broadcast_groups import BroadcastGroup, join_group
from actors.serving.weight_transfer import (
    CollectiveGroup,
    LoadReport,
    Transport,
    WeightTransferError,
    WeightUpdate,
    checksummed,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Where a node's shared memory is mounted.
SHARED_MEMORY = Path("/dev/shm")
#: Versions whose files are kept: the current one, and the one that a slow server may still be reading.
KEPT_VERSIONS = 2
#: Bytes of tensors in one object of Ray's object store; a larger tensor has one of its own.
PART_BYTES = 64 << 20
#: How often the object store holds the weights: the version before, the new one, and the new one again while
#: `WeightRegistry.put` takes it over.
STORED_COPIES = 3


class WeightPublisher(Protocol):
    """One transport, as the learner sees it."""

    def publish(self, version: int, named_tensors: Iterable[tuple[str, Tensor]]) -> WeightUpdate:
        """Make the weights of `version` available; what is returned goes to the registry and the servers."""

    def close(self) -> None:
        """Remove everything that was published."""


class SharedMemoryPublisher:
    """One safetensors file per version in the node's shared memory, or in `fallback_folder` where that is full.

    Memory that is new to a process costs several times what copying into it does, so the file of the version before the
    last is written over, tensor by tensor, instead of a new one being made. Nobody reads it by then: a version is
    published once every server serves the one before.
    """

    def __init__(self, run: str, fallback_folder: Path) -> None:
        """run: part of the files' names; unique on this machine, and not to be guessed by its other users."""
        self._run = run
        self._fallback_folder = fallback_folder

    def publish(self, version: int, named_tensors: Iterable[tuple[str, Tensor]]) -> WeightUpdate:
        """Raises `WeightTransferError` if neither place has room."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        name = f"{_file_prefix(self._run)}{version}.safetensors"
        checksums: dict[str, int] = {}
        named_tensors = checksummed(named_tensors, checksums)
        path = self._fallback_folder / name
        aside = path.with_suffix(".partial")
        try:
            if (spare := self._spare_file(name)) is None:
                tensors = _contiguous(named_tensors)
            else:
                path = spare.with_name(name)
                spare.rename(aside := path.with_suffix(".partial"))
                tensors = _overwrite(aside, named_tensors)
            if tensors:
                aside.unlink(missing_ok=True)
                path = self._place(sum(tensor.nbytes for tensor in tensors.values())) / name
                _make_private(aside := path.with_suffix(".partial"))
                save_file(tensors, aside)
            aside.rename(path)
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            raise WeightTransferError(f"weights version {version} could not be written to {path}: {error}") from error
        return WeightUpdate(version=version, transport="shared_memory", path=str(path), checksums=checksums)

    def close(self) -> None:
        remove_weight_files(self._run, self._fallback_folder)

    def _spare_file(self, name: str) -> Path | None:
        """The file to write over: that of the same version, as a learner that was restarted finds it, or the oldest."""
        files = [file for file in _weight_files(self._run, self._fallback_folder) if file.suffix == ".safetensors"]
        files.sort(key=lambda file: int(file.stem.rpartition("-")[2]))
        oldest = files[0] if len(files) >= KEPT_VERSIONS else None
        return next((file for file in files if file.name == name), oldest)

    def _place(self, size: int) -> Path:
        needed = size + (1 << 20)  # the file's header
        places = [SHARED_MEMORY, self._fallback_folder]
        free = [shutil.disk_usage(place).free for place in places]
        for place, room in zip(places, free, strict=True):
            if room >= needed:
                return place
        raise WeightTransferError(
            f"no room to publish {needed / 2**20:.0f} MiB of weights: "
            + ", ".join(f"{place} has {room / 2**20:.0f} MiB left" for place, room in zip(places, free, strict=True))
            + ". Free some, or make shared memory larger (docker: --shm-size)."
        )


class ObjectStorePublisher:
    """Safetensors files of about `PART_BYTES` each in Ray's object store, for servers on any node. This process's own
    memory has room for no more than one at a time."""

    def publish(self, version: int, named_tensors: Iterable[tuple[str, Tensor]]) -> WeightUpdate:
        """Raises `WeightTransferError` if this node's object store is too small."""
        import numpy as np
        import ray
        from safetensors.torch import save

        checksums: dict[str, int] = {}
        references = []
        size, capacity = 0, _object_store_bytes()
        for part in _parts(checksummed(named_tensors, checksums)):
            size += sum(tensor.nbytes for tensor in part.values())
            if STORED_COPIES * size <= capacity:
                references.append(ray.put(np.frombuffer(save(_contiguous(part.items())), np.uint8)))
        if STORED_COPIES * size > capacity:
            raise WeightTransferError(
                f"weights version {version} are {size / 2**20:.0f} MiB, and Ray's object store on this node has "
                f"{capacity / 2**20:.0f} MiB. It has to have {STORED_COPIES * size / 2**20:.0f}, {STORED_COPIES} times "
                "as much as the weights: set cluster.object_store_bytes (or, of a cluster that you started, "
                "`ray start --object-store-memory`), or another weight_sync.transport."
            )
        return WeightUpdate(version=version, transport="object_store", refs=tuple(references), checksums=checksums)

    def close(self) -> None:
        """Ray frees each object when nobody refers to it any more."""


class CollectivePublisher:
    """Broadcasts from this process into the engines: gloo between CPUs, NCCL between GPUs.

    A group of fixed membership: after a server restarts, `open` a new one and connect all again. NCCL needs GPUs and
    has not been run on the CPU machines where the rest is tested.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._rendezvous: CollectiveGroup | None = None
        self._group: BroadcastGroup | None = None

    def open(self, engines: int, workers_per_engine: int, address: str, deadline_s: float) -> CollectiveGroup:
        """Choose a port at this node's `address`; what is returned goes to `connect_servers`."""
        self._group = None
        self._rendezvous = CollectiveGroup(
            self._transport, address, _free_port(address), engines, workers_per_engine, deadline_s
        )
        return self._rendezvous

    def connect(self) -> None:
        """Connect to the engines, which must join at the same time. Raises `WeightTransferError` past the deadline."""
        group = self._rendezvous
        if group is None:
            raise WeightTransferError("open the weight sync group before connecting to it")
        self._group = join_group(group.transport, group.address, group.port, 0, group.world_size, group.deadline_s)

    def publish(self, version: int, named_tensors: Iterable[tuple[str, Tensor]]) -> WeightUpdate:
        """Announce what the next `send` will broadcast. Of the tensors it keeps nothing but their descriptions."""
        if self._group is None:
            raise WeightTransferError("the learner is not connected to the policy servers")
        checksums: dict[str, int] = {}
        described = [
            (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in checksummed(named_tensors, checksums)
        ]
        names, dtypes, shapes = zip(*described, strict=True)
        return WeightUpdate(
            version=version,
            transport=self._transport,
            names=names,
            dtypes=dtypes,
            shapes=shapes,
            checksums=checksums,
        )

    def send(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Broadcast the tensors that were announced, one after the other; every server must be loading them meanwhile.
        Raises `WeightTransferError`."""
        if self._group is None:
            raise WeightTransferError("the learner is not connected to the policy servers")
        for _, tensor in named_tensors:
            self._group.broadcast(tensor.detach().to(self._group.device).contiguous())

    def close(self) -> None:
        self._group = None


def make_publisher(transport: Transport, *, run: str, fallback_folder: Path) -> WeightPublisher:
    """The publisher of a transport."""
    if transport == "shared_memory":
        return SharedMemoryPublisher(run, fallback_folder)
    if transport == "object_store":
        return ObjectStorePublisher()
    return CollectivePublisher(transport)


def remove_weight_files(run: str, fallback_folder: Path) -> None:
    """Remove the weight files of a run on this node, also those of a learner that was killed."""
    for path in _weight_files(run, fallback_folder):
        path.unlink(missing_ok=True)


def sync_servers(
    servers: Mapping[str, Any], update: WeightUpdate, deadline_s: float, sending: Sequence[Any] = ()
) -> dict[str, LoadReport]:
    """Bring `update` to every policy server (name -> actor handle) and wait until all of them serve it.

    A server that is restarting is asked again. The deadline is of silence: each answer starts it again. `sending`:
    ObjectRefs of a broadcast under way, one per rank of the learner. Raises TimeoutError naming the servers that did
    not answer, and what a server or the broadcast raised.
    """
    waiting = {name: (lambda server=server: server.load.remote(update)) for name, server in servers.items()}
    return _wait_for_all(waiting, f"weights version {update.version}", deadline_s, sending)


def connect_servers(servers: Sequence[tuple[str, Any]], group: CollectiveGroup, connecting: Any) -> None:
    """Let every server join `group`; `connecting`: ObjectRef of the learner's own `connect` under way."""
    waiting = {
        name: (lambda server=server, engine=engine: server.join.remote(group, engine))
        for engine, (name, server) in enumerate(servers)
    }
    _wait_for_all(waiting, "the weight sync group", group.deadline_s + 5.0, [connecting])


def _wait_for_all(calls: Mapping[str, Any], what: str, deadline_s: float, others: Sequence[Any]) -> dict[str, Any]:
    """Make each call (name -> function returning an ObjectRef), again while its actor is down, until all answered.
    others: ObjectRefs of the learner's part, by rank."""
    import ray
    from ray.exceptions import RayActorError

    deadline = time.monotonic() + deadline_s
    pending = {call(): name for name, call in calls.items()}
    pending |= {other: f"learner rank {rank}" for rank, other in enumerate(others)}
    answers: dict[str, Any] = {}
    last_errors: dict[str, str] = {}
    again: list[str] = []
    while pending or again:
        left = deadline - time.monotonic()
        if left <= 0:
            silent = sorted([*pending.values(), *again])
            detail = "".join(f"; {name}: {last_errors[name]}" for name in silent if name in last_errors)
            raise TimeoutError(
                f"{what}: no answer from {', '.join(silent)} for {deadline_s:.0f} s (weight_sync.deadline_s){detail}"
            )
        done, _ = ray.wait(list(pending), timeout=min(left, 0.5)) if pending else ([], [])
        if not pending:
            time.sleep(min(left, 0.5))
        for name in again:
            pending[calls[name]()] = name
        again = []
        for ref in done:
            name = pending.pop(ref)
            try:
                answers[name] = ray.get(ref)
                deadline = time.monotonic() + deadline_s
            except RayActorError as error:
                if name not in calls:
                    raise
                last_errors[name] = str(error).strip().splitlines()[0]
                again.append(name)
    return {name: answers[name] for name in calls}


def _parts(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups, of `PART_BYTES` at most where that is not less than one tensor."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        if part and size + tensor.nbytes > PART_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part


def _object_store_bytes() -> int:
    """Of Ray's object store on this node."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return int(sum(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["NodeID"] == here))


def _contiguous(named_tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors}


def _overwrite(path: Path, named_tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Put tensors in the place of those of the same names, dtypes and shapes in a safetensors file.

    If the file has others, as one may that a run of the same name left, it is of no use. Then returns all tensors, for
    a new one; else {}.
    """
    import torch

    data = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    # The format: the header's length (8 bytes, little-endian), the header (JSON), the tensors' bytes end to end.
    begin = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
    layout = json.loads(data[8:begin].numpy().tobytes())
    layout.pop("__metadata__", None)
    written: dict[str, Tensor] = {}
    unwritten: dict[str, Tensor] = {}
    for name, tensor in named_tensors:
        place = layout.pop(name, None)
        if place is None or (place["dtype"], place["shape"]) != (_format_dtype(tensor.dtype), list(tensor.shape)):
            unwritten |= _contiguous([(name, tensor)])
            continue
        start, end = (begin + offset for offset in place["data_offsets"])
        written[name] = data[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    return written | unwritten if unwritten or layout else {}


@cache
def _format_dtype(dtype: torch.dtype) -> str:
    """The name of a dtype in a safetensors file, which is its own."""
    import torch
    from safetensors.torch import save

    data = save({"": torch.empty(0, dtype=dtype)})
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])[""]["dtype"]


def _make_private(path: Path) -> None:
    """Make an empty file that only this user can open. Every user of the machine may make files in shared memory, so
    what lies at the path already, such as a link, is not written to."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o600))


def _file_prefix(run: str) -> str:
    return f"coso-{re.sub(r'[^A-Za-z0-9_.-]', '_', run)}-"


def _weight_files(run: str, fallback_folder: Path) -> list[Path]:
    prefix = _file_prefix(run)
    pattern = re.compile(re.escape(prefix) + r"\d+\.(safetensors|partial)")
    return [
        path
        for folder in (SHARED_MEMORY, fallback_folder)
        if folder.is_dir()
        for path in folder.iterdir()
        if pattern.fullmatch(path.name)
    ]


def _free_port(address: str) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
