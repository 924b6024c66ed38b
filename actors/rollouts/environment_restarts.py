"""When a failed environment is started again: back-off, then quarantine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """After the n-th failure in a row wait `initial_s` * 2^(n-1), at most `maximum_s`; from the
    `quarantine_after`-th on wait `quarantine_s`. Times in seconds."""

    initial_s: float = 0.5
    maximum_s: float = 30.0
    quarantine_after: int = 5
    quarantine_s: float = 300.0

    def __post_init__(self) -> None:
        if min(self.initial_s, self.maximum_s, self.quarantine_s) < 0 or self.quarantine_after < 1:
            raise ValueError(f"a restart policy needs waits of at least 0 and quarantine_after >= 1: {self}")


class RestartSchedule:
    """The failures of one environment slot, and when it may be tried again."""

    def __init__(self, policy: RestartPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self.policy = policy
        self.failures_in_a_row = 0
        self._clock = clock
        self._next_try = clock()

    @property
    def quarantined(self) -> bool:
        """Whether the slot has failed too often in a row and its next try still lies ahead."""
        return self.failures_in_a_row >= self.policy.quarantine_after and self.wait_s() > 0

    def wait_s(self) -> float:
        """Seconds until the slot may be tried again; 0 when it may now."""
        return max(0.0, self._next_try - self._clock())

    def failed(self) -> float:
        """Count a failure; returns the seconds to wait before the next try."""
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= self.policy.quarantine_after:
            wait_s = self.policy.quarantine_s
        else:
            wait_s = min(self.policy.initial_s * 2 ** (self.failures_in_a_row - 1), self.policy.maximum_s)
        self._next_try = self._clock() + wait_s
        return wait_s

    def succeeded(self) -> None:
        """Forget the failures: an episode went well (one that only starts and then dies again is not well)."""
        self.failures_in_a_row = 0
        self._next_try = self._clock()
