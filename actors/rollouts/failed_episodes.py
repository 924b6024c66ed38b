"""Ends a run whose episodes fail too often: a single failure is data, many in a row are a fault to fix."""

from __future__ import annotations

from collections import Counter, deque

#: Latest episodes of a rollout worker, of which `rollout.max_failed_episodes` may fail.
EPISODE_WINDOW = 50


class TooManyFailedEpisodes(RuntimeError):
    """More than `rollout.max_failed_episodes` of the latest episodes have failed."""


class FailedEpisodes:
    """The share of failed episodes among the latest `EPISODE_WINDOW` of one worker."""

    def __init__(self, environment: str, limit: float) -> None:
        """limit: largest share in [0, 1]."""
        self._environment = environment
        self._limit = limit
        self._reasons: deque[str] = deque(maxlen=EPISODE_WINDOW)  # "" for an episode that came to its end

    def finished(self) -> None:
        """Count an episode that came to its end."""
        self._reasons.append("")

    def failed(self, episode: str, reason: str, detail: str) -> None:
        """Count an episode that failed. Raises `TooManyFailedEpisodes` above the limit."""
        self._reasons.append(reason)
        counts = Counter(filter(None, self._reasons))
        if len(self._reasons) == EPISODE_WINDOW and counts.total() > self._limit * EPISODE_WINDOW:
            reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
            raise TooManyFailedEpisodes(
                f"{counts.total()} of the latest {EPISODE_WINDOW} episodes of {self._environment} failed ({reasons}); "
                f"rollout.max_failed_episodes is {self._limit:g}. The latest is episode {episode}: {detail}"
            )
