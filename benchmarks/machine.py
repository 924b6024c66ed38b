"""What the machine gives: wall time of a call, and the rate of matrix products on one thread and in two processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall seconds of a call, and its result."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def matmul_rate(begin: float, seconds: float) -> float:
    """FLOP/s of float32 matrix products on one thread of this process, from the time `begin` on."""
    torch.set_num_threads(1)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    time.sleep(max(0.0, begin - time.time()))
    products, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        left @ right
        products += 1
    return products * 2 * 1024**3 / (time.perf_counter() - begun)


def machine_scaling() -> float:
    """What two processes get of the machine, over what one gets: no pool can scale better. The best of three."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        list(processes.map(matmul_rate, [0.0] * 2, [0.1] * 2))  # both have imported torch
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(3):
            for count in (1, 2):
                begin = time.time() + 0.3
                rates[count].append(sum(processes.map(matmul_rate, [begin] * count, [2.0] * count)))
    return max(rates[2]) / max(rates[1])


def matmul_peak() -> float:
    """Best rate of a float32 matrix product on one thread, FLOP/s."""
    left, right = torch.randn(1536, 1536), torch.randn(1536, 1536)
    best = min(timed(lambda: left @ right)[0] for _ in range(12))
    return 2 * 1536**3 / best
