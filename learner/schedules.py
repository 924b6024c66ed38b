"""Learning rates as plain functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from learner.settings import LearnerSettings


def learning_rate(settings: LearnerSettings, update: int, total_updates: int) -> float:
    """The rate of update `update` (0-based).

    cosine: `learning_rate` at update 0, `final_learning_rate` at update `total_updates - 1`, half a cosine between, and
    flat after that (RL4VLM, arXiv 2405.10292, where one course spans the run's 25 updates).
    """
    start = settings.learning_rate
    if settings.schedule == "constant":
        return start
    progress = min(update / max(total_updates - 1, 1), 1.0)
    final = min(settings.final_learning_rate, start)
    return final + (start - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warm_up_and_decay(peak: float, step: int, steps: int, warm_up_share: float) -> float:
    """Linear from peak / w to `peak` over the first w = `warm_up_share` of the steps, then linear towards 0, which
    would be reached at step `steps` (0-based `step` < `steps`, so every step moves the weights)."""
    warm_up = max(1, round(steps * warm_up_share))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (steps - step) / max(steps - warm_up + 1, 1)
