"""Environments that take their time: a step that waits, as a real emulator makes one wait."""

from __future__ import annotations

import math
import time
from typing import Any, SupportsFloat

import gymnasium
import numpy as np

from envs.cards.number_line import NumberLine


class LatencyWrapper(gymnasium.Wrapper[Any, Any, Any, Any], gymnasium.utils.RecordConstructorArgs):
    """Makes every step wait a log-normal time of the given mean (ms) and sigma (of its logarithm).

    The waits come from a generator spawned from the environment's `np_random` at a seeded reset: they repeat
    with the seed, and the wrapped environment draws exactly what it draws alone.
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
        """Reset at full speed; with a seed, the sequence of waits begins anew."""
        result = self.env.reset(seed=seed, options=options)
        if seed is not None or self._waits is None:
            self._waits = self.env.np_random.spawn(1)[0]
        return result

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Wait, then step. The wait is put into `info["latency_s"]`."""
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


# gymnasium asks an entry point for the render modes it can be made in.
slow_number_line.metadata = NumberLine.metadata  # type: ignore[attr-defined]
