"""When a failed environment is started again: back-off, then quarantine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class RestartSettings(Protocol):
    """What a schedule reads of the settings that it is given. `envs.settings.EnvironmentSettings` has these fields and
    describes them; the agent of a node's emulators has its own values for them."""

    @property
    def restart_backoff_s(self) -> float: ...
    @property
    def restart_backoff_max_s(self) -> float: ...
    @property
    def quarantine_after(self) -> int: ...
    @property
    def quarantine_s(self) -> float: ...


class RestartSchedule:
    """The failures of one environment slot, and when it may be tried again.

    After the n-th failure in a row it waits `restart_backoff_s` * 2^(n-1), at most `restart_backoff_max_s`. From the
    `quarantine_after`-th failure on it waits `quarantine_s`.
    """

    def __init__(self, settings: RestartSettings, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: returns the time in seconds."""
        self.failures_in_a_row = 0
        self._settings = settings
        self._clock = clock
        self._next_try = clock()

    @property
    def quarantined(self) -> bool:
        """Whether the slot has failed too often in a row and may not be tried again yet."""
        return self.failures_in_a_row >= self._settings.quarantine_after and self.wait_s() > 0

    def wait_s(self) -> float:
        """Seconds until the slot may be tried again; 0 when it may now."""
        return max(0.0, self._next_try - self._clock())

    def failed(self) -> float:
        """Count a failure; returns the seconds to wait before the next try."""
        self.failures_in_a_row += 1
        settings = self._settings
        if self.failures_in_a_row >= settings.quarantine_after:
            wait_s = settings.quarantine_s
        else:
            doubled_s = settings.restart_backoff_s * 2 ** (self.failures_in_a_row - 1)
            wait_s = min(doubled_s, settings.restart_backoff_max_s)
        self._next_try = self._clock() + wait_s
        return wait_s

    def succeeded(self) -> None:
        """Forget the failures: a whole episode was played. (A start alone does not count: the next step may fail.)"""
        self.failures_in_a_row = 0
        self._next_try = self._clock()
