"""The running mean and deviation of returns, so that a value head learns numbers of about 1 for any reward."""

from __future__ import annotations

import math

import numpy as np

#: What one update's returns weigh less with each later update.
DECAY = 0.9
#: Returns that vary less than this, in units of reward, are taken to be constant.
SMALLEST_DEVIATION = 1e-2


class ReturnScale:
    """Exponential running moments over updates, without the bias towards the start (as Adam's).

    return = mean + deviation · (what the value head says). Before the first update it is 0 + 1 · that.
    """

    def __init__(self) -> None:
        self._weight = self._mean = self._square = 0.0

    @property
    def mean(self) -> float:
        return self._mean / self._weight if self._weight else 0.0

    @property
    def deviation(self) -> float:
        if not self._weight:
            return 1.0
        return max(math.sqrt(max(self._square / self._weight - self.mean**2, 0.0)), SMALLEST_DEVIATION)

    def update(self, returns: np.ndarray) -> tuple[float, float]:
        """Take in the returns of one update's steps, in units of reward.

        Returns (gain, shift): gain · v + shift says in the new unit what v said in the old one (PopArt, arXiv
        1602.07714). The first time (1, 0): a head that has learnt nothing says the mean.
        """
        first, mean, deviation = not self._weight, self.mean, self.deviation
        self._weight = DECAY * self._weight + (1 - DECAY)
        self._mean = DECAY * self._mean + (1 - DECAY) * float(returns.mean())
        self._square = DECAY * self._square + (1 - DECAY) * float(np.square(returns, dtype=np.float64).mean())
        return (1.0, 0.0) if first else (deviation / self.deviation, (mean - self.mean) / self.deviation)

    def normalised(self, returns: np.ndarray) -> np.ndarray:
        return (returns - self.mean) / self.deviation

    def restored(self, values: np.ndarray) -> np.ndarray:
        """What the value head says, in units of reward."""
        return self.mean + self.deviation * values

    def state(self) -> dict[str, float]:
        return {"return_weight": self._weight, "return_mean": self._mean, "return_square": self._square}

    def load(self, state: dict[str, float]) -> None:
        self._weight, self._mean = state["return_weight"], state["return_mean"]
        self._square = state["return_square"]
