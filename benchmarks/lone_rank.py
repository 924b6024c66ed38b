"""A learner of one rank in this process, without Ray."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learner.rank import LearnerRank
    from learner.setup import LearnerSetup


def started_alone(setup: LearnerSetup) -> LearnerRank:
    """The rank, with its model loaded. Several may be made in one process, one after the other."""
    from learner.rank import LearnerRank

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = LearnerRank(setup, 0, 1)
    rank.start("127.0.0.1", port)
    return rank
