"""What a learner is started with: sections of the run's config as they are, and what is known only at run time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.settings import ModelSettings
from learner.algorithms.base import AlgorithmSettings
from learner.settings import EntropySettings, LearnerSettings

if TYPE_CHECKING:
    from actors.serving.weight_transfer import Transport


@dataclass(frozen=True, kw_only=True)
class PublishTarget:
    """How new weights leave the learner."""

    transport: Transport
    run: str  # unique among the runs of the machine
    fallback_folder: Path  # where shared memory has no room


@dataclass(frozen=True, kw_only=True)
class LearnerSetup:
    """All that a rank must know."""

    model: ModelSettings
    learner: LearnerSettings
    algorithm: AlgorithmSettings
    entropy: EntropySettings
    temperature: float  # of the distribution that was sampled from
    total_updates: int  # that the schedules span; there may be more
    max_policy_lag: int | None  # steps of older versions give context only; None: all are trained on
    seed: int
    publishing: PublishTarget | None = None  # None: a learner without policy servers (warm start)
