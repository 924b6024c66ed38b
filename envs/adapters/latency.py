"""Slow environments: steps that wait, as steps of a real emulator do."""

from __future__ import annotations

import math
import time
from typing import Any, SupportsFloat

import gymnasium
import numpy as np

from envs.cards.number_line import NumberLine


class LatencyWrapper(gymnasium.Wrapper[Any, Any, Any, Any], gymnasium.utils.RecordConstructorArgs):
    """Makes every step wait a log-normal time with the given mean (ms) and sigma (of its logarithm).

    The waits come from a generator spawned from the environment's `np_random` at a seeded reset. They repeat
    with the seed and do not change what the wrapped environment draws.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], mean_ms: float = 200.0, sigma: float = 0.5) -> None:
        if not mean_ms > 0 or not sigma >= 0:
            raise ValueError(f"latency needs mean_ms > 0 and sigma >= 0, not {mean_ms!r} and {sigma!r}")
        gymnasium.utils.RecordConstructorArgs.__init__(self, mean_ms=mean_ms, sigma=sigma)
        super().__init__(env)
        self.sigma = sigma
        # The mean of a log-normal is exp(mu + sigma^2 / 2).
        self._mu = math.log(mean_ms / 1000) - sigma**2 / 2
        self._waits: np.random.Generator | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset without a wait; with a seed, the sequence of waits starts again."""
        result = self.env.reset(seed=seed, options=options)
        if seed is not None or self._waits is None:
            self._waits = self.env.np_random.spawn(1)[0]
        return result

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Wait, then step. `info["latency_s"]` is the wait in seconds."""
        if self._waits is None:
            raise gymnasium.error.ResetNeeded("call reset() before the first step()")
        wait_s = float(self._waits.lognormal(self._mu, self.sigma))
        time.sleep(wait_s)
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "latency_s": wait_s}


def slow_number_line(
    mean_ms: float = 200.0, sigma: float = 0.5, render_mode: str | None = None, **kwargs: Any
) -> LatencyWrapper:
    """`coso/SlowNumberLine-v0`: NumberLine (with its kwargs) whose steps take `mean_ms` on average."""
    return LatencyWrapper(NumberLine(render_mode=render_mode, **kwargs), mean_ms, sigma)


# gymnasium reads the render modes from the entry point.
slow_number_line.metadata = NumberLine.metadata  # type: ignore[attr-defined]
