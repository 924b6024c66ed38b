"""Environments that wait: the waits have the stated distribution, repeat with the seed, and change nothing else."""

import time
from typing import Any

import gymnasium
import numpy as np
import pytest

import envs  # noqa: F401  (registers coso/...)
from envs.adapters.latency import LatencyWrapper

SLOW = "coso/SlowNumberLine-v0"
INVALID = "?"


def played(env: gymnasium.Env[Any, Any], seed: int, steps: int) -> list[Any]:
    """States and executed (random) actions over several episodes."""
    trace = [env.reset(seed=seed)[1]["state"]]
    for _ in range(steps):
        _, reward, terminated, truncated, info = env.step(INVALID)
        trace.append((info["state"], info["executed_action"], reward))
        if terminated or truncated:
            trace.append(env.reset()[1]["state"])
    return trace


def waits(env: gymnasium.Env[Any, Any], seed: int, steps: int) -> list[float]:
    env.reset(seed=seed)
    result = []
    for _ in range(steps):
        _, _, terminated, truncated, info = env.step(INVALID)
        result.append(info["latency_s"])
        if terminated or truncated:
            env.reset()
    return result


def test_the_slow_game_plays_exactly_like_the_fast_one() -> None:
    slow = gymnasium.make(SLOW, mean_ms=0.1)
    assert played(slow, 5, 60) == played(gymnasium.make("coso/NumberLine-v0"), 5, 60)


def test_waits_repeat_with_the_seed_and_are_really_waited() -> None:
    env = gymnasium.make(SLOW, mean_ms=5)
    started = time.monotonic()
    first = waits(env, 3, 20)
    assert time.monotonic() - started >= sum(first)
    assert waits(env, 3, 20) == first
    assert waits(env, 4, 20) != first


def test_waits_are_lognormal_with_the_stated_mean_and_sigma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    seconds = np.array(waits(gymnasium.make(SLOW, mean_ms=200, sigma=0.5), 0, 4000))
    # Standard errors: mean 0.2 * sqrt(exp(0.25) - 1) / sqrt(4000) = 0.0017; sigma 0.5 / sqrt(8000) = 0.0056.
    assert abs(seconds.mean() - 0.2) < 0.008
    assert abs(np.log(seconds).std() - 0.5) < 0.025


@pytest.mark.parametrize("kwargs", [{"mean_ms": 0}, {"mean_ms": -1}, {"sigma": -0.1}, {"mean_ms": float("nan")}])
def test_waits_that_cannot_be_are_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="latency needs"):
        LatencyWrapper(gymnasium.make("coso/NumberLine-v0"), **kwargs)
