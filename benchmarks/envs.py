"""Speed and memory of the games, one process, one core: steps/s and resets/s with rendering, memory, leaks.

    python -m benchmarks.envs --out benchmarks/results/envs.json

A step parses a JSON answer with a random action of the game and returns picture, prompt and info; resets are timed
separately. Times are CPU times, so other work on the machine has little effect. Memory per environment is what Python
and NumPy allocate for each of 50 environments after reset and one step, without the shared pictures.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil

import envs
from benchmarks.record import record
from envs.cards.art import card_picture
from envs.cards.deck import ALL_CARDS

#: Required (steps/s, resets/s) of each game on one core.
FLOORS = {"NumberLine": (8000, 2000), "Blackjack": (4000, 2000), "EZPoints": (8000, 2000), "Points24": (8000, 2000)}
CARD_WIDTHS = (35, 67, 70, 135)
MEMORY_FLOOR_BYTES = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="random steps per game, timed and checked for leaks")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    started = time.process_time()
    art_bytes = sum(card_picture(code, width).nbytes for code in ALL_CARDS for width in CARD_WIDTHS)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "shared_art": {"bytes": art_bytes, "seconds_to_draw": round(time.process_time() - started, 2)},
        "games": {},
    }
    for game, (step_floor, reset_floor) in FLOORS.items():
        measured = measure(f"{envs.NAMESPACE}/{game}-v0", arguments.steps)
        measured["floors_met"] = (
            measured["steps_per_second"] >= step_floor
            and measured["resets_per_second"] >= reset_floor
            and measured["bytes_per_environment"] < MEMORY_FLOOR_BYTES
        )
        result["games"][game] = measured
        print(game, measured, flush=True)
    record(arguments.out, result)


def measure(env_id: str, steps: int) -> dict[str, Any]:
    """Results of one game over `steps` steps with random actions."""
    env = gymnasium.make(env_id)
    task: Any = env.unwrapped
    rng = np.random.default_rng(0)
    answers = [json.dumps({"thoughts": "", "action": word}) for word in task.action_words]
    choices = rng.integers(len(answers), size=steps).tolist()
    env.reset(seed=0)
    play(env, answers, choices[: steps // 20])
    gc.collect()
    before = psutil.Process().memory_info().rss
    step_seconds, reset_seconds, resets = play(env, answers, choices)
    gc.collect()
    after = psutil.Process().memory_info().rss
    return {
        "steps_per_second": round(steps / step_seconds),
        "resets_per_second": round(resets / reset_seconds),
        "steps": steps,
        "resets": resets,
        "resident_bytes_grown": after - before,
        "bytes_per_environment": bytes_per_environment(env_id, answers),
    }


def play(env: gymnasium.Env[Any, Any], answers: list[str], choices: list[int]) -> tuple[float, float, int]:
    """(CPU seconds in steps, CPU seconds in resets, number of resets)."""
    clock = time.process_time
    in_resets, resets = 0.0, 0
    started = clock()
    for choice in choices:
        _, _, terminated, truncated, _ = env.step(answers[choice])
        if terminated or truncated:
            at = clock()
            env.reset()
            in_resets += clock() - at
            resets += 1
    return clock() - started - in_resets, in_resets, resets


def bytes_per_environment(env_id: str, answers: list[str], count: int = 50) -> int:
    """Bytes allocated per environment, over `count` environments, each reset and stepped once."""
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        made = [gymnasium.make(env_id) for _ in range(count)]
        for index, env in enumerate(made):
            env.reset(seed=index)
            env.step(answers[index % len(answers)])
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) // len(made)
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    main()
