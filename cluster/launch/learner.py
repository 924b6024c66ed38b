"""Starting the learner of a run: its setup from the config, its ranks as Ray actors."""

from __future__ import annotations

from typing import Any

from cluster.config.run_config import RunConfig
from learner.group import LearnerGroup, RankResources
from learner.setup import LearnerSetup, PublishTarget


def learner_setup(config: RunConfig, publishing: PublishTarget | None = None) -> LearnerSetup:
    """What the run's config says to a learner."""
    return LearnerSetup(
        model=config.model,
        learner=config.learner,
        algorithm=config.algorithm,
        entropy=config.entropy,
        temperature=config.rollout.temperature,
        total_updates=config.learner.schedule_updates or config.training.updates,
        max_policy_lag=config.max_policy_lag if config.mode == "async" else None,
        seed=config.seed,
        publishing=publishing,
    )


def start_learner(config: RunConfig, setup: LearnerSetup, placement_group: Any) -> LearnerGroup:
    """The ranks, with the model loaded. placement_group: see `RankResources`. Raises what `LearnerGroup` raises."""
    resources = RankResources(
        cpus=config.cluster.learner_cpus, gpus=setup.learner.gpus, placement_group=placement_group
    )
    return LearnerGroup(setup, resources)
