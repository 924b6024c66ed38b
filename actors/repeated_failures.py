"""The rule for trying again: the same failure twice without progress in between is final."""

from __future__ import annotations

import re
from collections import defaultdict


class RepeatedFailures:
    """Remembers why processes failed since they last came further.

    Used for everything that is started again: policy servers, rollout workers and learner (`cluster.run.supervision`),
    scorers and the SCM's trainer (`scoring.pool`).
    """

    def __init__(self) -> None:
        self._since_progress: defaultdict[str, set[str]] = defaultdict(set)

    def verdict(self, who: str, reason: str) -> str | None:
        """Note a failure. If `who` failed for the same reason before without progress in between, returns why to try
        once more would not help, and quotes the reason; else None. Two reasons are the same if they differ in numbers
        only."""
        kind = re.sub(r"0x[0-9a-f]+|\b[0-9a-f]{16,}\b|\d+", "#", reason)
        if kind in self._since_progress[who]:
            return (
                f"the {who} failed twice in the same way without progress in between, so it is not started again: "
                f"{reason}"
            )
        self._since_progress[who].add(kind)
        return None

    def progressed(self, who: str) -> None:
        """`who` came further; whatever fails from here on fails for the first time."""
        self._since_progress.pop(who, None)
