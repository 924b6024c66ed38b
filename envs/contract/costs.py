"""The checks of what an environment costs: time, and memory, files and threads that must not grow."""

from __future__ import annotations

import gc
import statistics
import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import psutil

from envs.contract.player import SEED, Environment, Player
from envs.contract.result import Broken, Passed

WINDOWS = 4
RESETS_PER_WINDOW = 3
#: A measure grows if it grew by more than this in each window after the first (which fills caches), and by more than
#: this over all of them. Bytes, of Python and in all (with those of libraries): per step; files, threads: per window.
LIMITS = {"files": (2, 6), "threads": (2, 6), "python_bytes": (256, 256 << 10), "resident_bytes": (8 << 10, 16 << 20)}


def times(subject: Environment) -> Passed:
    """Resets and steps end well within the deadline of a run."""
    rng = np.random.default_rng(SEED)
    with Player(subject) as player:
        for _ in player.play(200, rng, cheap=True):
            pass
        measured: dict[str, float] = {}
        for name, seconds in (("reset", player.reset_s), ("step", player.step_s)):
            measured |= {f"{name}_ms_median": 1000 * statistics.median(seconds), f"{name}_ms_max": 1000 * max(seconds)}
            if max(seconds) > subject.deadline_s:
                raise Broken(
                    f"a {name} takes {max(seconds):.1f} s, but a run ends an environment after "
                    f"{subject.deadline_s:g} s: make it faster, or set environment.deadline_s higher"
                )
    return Passed(measured)


def memory(subject: Environment) -> Passed:
    """Memory, files and threads do not grow with steps and episodes: equal windows of both are compared."""
    with Player(subject) as player:
        return _growth(player, np.random.default_rng(SEED))


def _growth(player: Player, rng: np.random.Generator) -> Passed:
    steps = _steps_per_window(player, rng)
    process = psutil.Process()
    held: list[dict[str, int]] = []
    tracemalloc.start()
    try:
        for window in range(WINDOWS):
            if window == 1:
                before = tracemalloc.take_snapshot()
            _window(player, steps, rng)
            gc.collect()
            held.append(
                {
                    "python_bytes": tracemalloc.get_traced_memory()[0],
                    "resident_bytes": process.memory_info().rss,
                    "files": process.num_fds(),
                    "threads": threading.active_count(),
                }
            )
        places = tracemalloc.take_snapshot().compare_to(before, "lineno")
    finally:
        tracemalloc.stop()
    for name, (per_step, in_all) in LIMITS.items():
        values = [each[name] for each in held]
        least = min(after - earlier for earlier, after in zip(values[:-1], values[1:], strict=True))
        by_step = name.endswith("bytes")
        if least > per_step * (steps if by_step else 1) and values[-1] - values[0] > in_all:
            what = f"{least / steps:.0f} bytes a step" if by_step else f"{least} in {RESETS_PER_WINDOW} resets"
            raise Broken(
                f"{name.replace('_', ' ')} grow without end: by {what}, and by {values[-1] - values[0]:,} over "
                f"{(WINDOWS - 1) * steps} steps. {_advice(name, places)}"
            )
    grown = held[-1]["python_bytes"] - held[0]["python_bytes"]
    return Passed({"steps": WINDOWS * steps, "resident_mb": held[-1]["resident_bytes"] / 1e6, "grown_kb": grown / 1e3})


def _steps_per_window(player: Player, rng: np.random.Generator) -> int:
    begun = time.perf_counter()
    _window(player, 20, rng)
    # Python's own trace of its memory makes steps about three times as slow.
    step_s = 3 * (time.perf_counter() - begun) / 20
    return int(np.clip(player.subject.play_s / WINDOWS / step_s, 10, 300))


def _window(player: Player, steps: int, rng: np.random.Generator) -> None:
    for _ in range(RESETS_PER_WINDOW):
        player.reset(int(rng.integers(2**31)))
    for _ in range(steps):
        if player.over:
            player.reset(int(rng.integers(2**31)))
        player.step(player.answer(rng, cheap=True))
    player.reset_s.clear()
    player.step_s.clear()


def _advice(name: str, places: list[Any]) -> str:
    if name == "python_bytes":
        top = places[0]
        frame = top.traceback[0]
        return f"Most of it ({top.size_diff:,} bytes) was allocated at {frame.filename}:{frame.lineno}"
    if name == "resident_bytes":
        return "It is not Python's own memory: close pictures, surfaces and handles of libraries at each reset"
    return "Close what an episode opened when the next one begins, and in close()"
