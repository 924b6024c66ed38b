"""How many emulators a node can carry."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import CosoError

#: What an emulator takes beside its guest's memory, and what is left to everything else on the node, in MB.
OVERHEAD_MB, RESERVED_MB = 768, 4096
#: Cores of the node per emulator: guests idle while an agent thinks, so they may share.
CORES_EACH = 1.0


@dataclass(frozen=True)
class Capacity:
    """What a node has: cores this process may use, free memory in MB, and whether KVM can be used."""

    cores: int
    memory_mb: int
    kvm: bool


def measure() -> Capacity:
    """This node's capacity."""
    memory = psutil.virtual_memory().available // 2**20
    return Capacity(len(os.sched_getaffinity(0)), int(memory), os.access(Path("/dev/kvm"), os.R_OK | os.W_OK))


def emulator_count(asked: int | None, capacity: Capacity, memory_mb: int) -> int:
    """How many emulators of `memory_mb` to run: as many as asked, else as many as the node can carry.

    Raises CosoError, naming what is short, where the node can carry none and none were asked for.
    """
    if asked is not None:
        return asked
    if not capacity.kvm:
        raise CosoError(
            "this node has no KVM that this user may use (/dev/kvm); without it an emulator is too slow to train on: "
            "add the user to the group kvm, use another node, or insist with --count"
        )
    by_cores = int(capacity.cores / CORES_EACH)
    by_memory = (capacity.memory_mb - RESERVED_MB) // (memory_mb + OVERHEAD_MB)
    if by_memory < 1:
        raise CosoError(
            f"{capacity.memory_mb} MB of memory are free; the first emulator needs "
            f"{RESERVED_MB + memory_mb + OVERHEAD_MB} (less with --memory, or insist with --count)"
        )
    return max(1, min(by_cores, by_memory))
