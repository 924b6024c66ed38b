"""How many emulators a node can run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import CosoError

#: Memory of an emulator beyond its guest's, and memory reserved for everything else on the node, MB.
OVERHEAD_MB, RESERVED_MB = 768, 4096
#: Cores of the node per emulator.
CORES_EACH = 1.0


@dataclass(frozen=True)
class Capacity:
    """A node's capacity: cores this process may use, free memory in MB, and whether KVM is usable."""

    cores: int
    memory_mb: int
    kvm: bool


def measure() -> Capacity:
    """Measure this node's capacity."""
    memory = psutil.virtual_memory().available // 2**20
    return Capacity(len(os.sched_getaffinity(0)), int(memory), os.access(Path("/dev/kvm"), os.R_OK | os.W_OK))


def emulator_count(asked: int | None, capacity: Capacity, memory_mb: int) -> int:
    """How many emulators of `memory_mb` to run: the number asked for, else as many as the node can run.

    Raises CosoError that names what is missing, if no number was given and the node can run none.
    """
    if asked is not None:
        return asked
    if not capacity.kvm:
        raise CosoError(
            "this user cannot use KVM on this node (/dev/kvm); without it an emulator is too slow for training: "
            "add the user to the group kvm, use another node, or force it with --count"
        )
    by_cores = int(capacity.cores / CORES_EACH)
    by_memory = (capacity.memory_mb - RESERVED_MB) // (memory_mb + OVERHEAD_MB)
    if by_memory < 1:
        raise CosoError(
            f"{capacity.memory_mb} MB of memory are free, but one emulator needs "
            f"{RESERVED_MB + memory_mb + OVERHEAD_MB} (lower it with --memory, or force it with --count)"
        )
    return max(1, min(by_cores, by_memory))
