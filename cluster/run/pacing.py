"""How many steps the rollouts may make ahead: what the learner uses next, predicted from measured rates."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

#: Rollouts begin this much earlier than predicted, as a factor on the time that a batch takes.
HEADROOM = 1.1
#: Shortest time of an update that is reckoned with, seconds.
SHORTEST_UPDATE_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Measured rates. steps_per_s: fresh steps that all environments make when none has to wait. The others are
    seconds: of an episode, of preparing a collected batch for the learner (scoring), and of the learner's part of an
    update (all but waiting for the batch)."""

    steps_per_s: float
    episode_s: float
    preparation_s: float
    learner_s: float


def steps_ahead(pace: Pace, steps_per_update: int, usable_updates: int) -> int:
    """Steps to make beyond the batch that is being collected, so that later batches are ready just in time.

    When the collection of a batch begins, the learner begins an update. It takes the k-th batch after the one being
    collected after k + 1 updates. That batch has to begin earlier by the time that it takes. What has to begin within
    the present update is allowed now:

        Σ_k clip(batch − k · rate · update time, 0, steps_per_update),   k = 1, 2, …
        batch = HEADROOM · (max(rate · episode, steps_per_update + rate · episode / 2) + rate · preparation)

    `batch` is the time that a batch takes, in steps. When all environments begin an episode at once, they are behind an
    even flow by half an episode. A batch that is smaller than one episode of each takes as long as an episode.

    Where the learner takes longer than a batch, the sum is 0: each batch is then made by the weights of the update
    before. Where rollouts are slower, it never makes them wait.

    usable_updates: later updates that may still use what the present weights make. An episode ends under later weights,
    and so is usable for as many more updates as it lasts. Below 0, not even the present batch may be made yet, and the
    result is below 0 too.
    """
    if usable_updates < 0 or pace.steps_per_s == 0:
        return min(usable_updates, 0) * steps_per_update
    learner_s = max(pace.learner_s, SHORTEST_UPDATE_S)
    in_flight = pace.steps_per_s * pace.episode_s
    collected = max(in_flight, steps_per_update + in_flight / 2)
    batch_steps = HEADROOM * (collected + pace.steps_per_s * pace.preparation_s)
    updates = usable_updates + int(pace.episode_s / learner_s)
    begun = (batch_steps - k * pace.steps_per_s * learner_s for k in range(1, updates + 1))
    return sum(round(min(steps, steps_per_update)) for steps in takewhile(lambda steps: steps > 0, begun))
