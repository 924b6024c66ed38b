"""What an update does with each step of its batch, known before it begins: to whom it goes, and when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.trajectory import TrajectoryBatch
from learner.division import assign_rows, by_length, filler, minibatches
from learner.mismatch import token_versions
from learner.setup import LearnerSetup

#: What random numbers are drawn for: the first word of a seed.
ORDER = 1


@dataclass(frozen=True)
class UpdatePlan:
    """Of a batch of N steps; the same on every rank, and for any number of ranks but for the owners."""

    trained: np.ndarray  # bool (N,): steps that the loss sees; the others are too old and give context only
    minibatches: list[np.ndarray]  # int64 (m,) row numbers of one optimizer step after the other, all epochs
    owners: np.ndarray  # int64 (N,): the rank that makes all passes over a step


def plan_update(trajectories: TrajectoryBatch, setup: LearnerSetup, update_index: int, world_size: int) -> UpdatePlan:
    """update_index: 0-based; also the version of the weights that the update begins with."""
    trained = _fresh(token_versions(trajectories), update_index, setup.max_policy_lag)
    rows = np.flatnonzero(trained)
    orders = [
        rows[chosen]
        for epoch in range(setup.algorithm.epochs)
        for chosen in minibatches(len(rows), setup.learner.minibatch, (setup.seed, ORDER, update_index, epoch))
    ]
    everything = np.arange(len(trajectories))
    sets = [everything, final_rows(trajectories), *orders]
    in_order = by_length(everything, step_lengths(trajectories))
    return UpdatePlan(trained, orders, assign_rows(sets, in_order, world_size))


def images_of_rank(trajectories: TrajectoryBatch, plan: UpdatePlan, rank: int) -> dict[str, bytes]:
    """The images that `rank` needs for the plan, in the order in which it will first use them."""
    everything, final = np.arange(len(trajectories)), final_rows(trajectories)
    mine = by_length(everything[plan.owners == rank], step_lengths(trajectories))
    shown, shown_last = (trajectories.steps[name].to_pylist() for name in ("image", "final_image"))
    keys = [shown[row] for row in mine] + [shown_last[row] for row in final[plan.owners[final] == rank]]
    # What it runs while others work on steps of theirs.
    keys += [shown[row] for rows in (everything, *plan.minibatches) for row in filler(rows, plan.owners, rank)]
    keys += [shown_last[row] for row in filler(final, plan.owners, rank)]
    return {key: trajectories.images[key] for key in dict.fromkeys(keys)}


def final_rows(trajectories: TrajectoryBatch) -> np.ndarray:
    """int64 (F,), numbers of the rows that have a final observation."""
    return np.flatnonzero(trajectories.steps["final_image"].is_valid().to_numpy())


def step_lengths(trajectories: TrajectoryBatch) -> np.ndarray:
    """int64 (N,), tokens of prompt and response."""
    parts = [trajectories.ragged(column, np.int32) for column in ("prompt_ids", "response_ids")]
    return np.array([len(prompt) + len(response) for prompt, response in zip(*parts, strict=True)], np.int64)


def _fresh(versions: Sequence[np.ndarray], version: int, limit: int | None) -> np.ndarray:
    """bool (N,): steps none of whose tokens is older than `limit` versions. A batch without any is trained on whole,
    since its episodes were accepted."""
    oldest = np.array([of_step.min() if len(of_step) else version for of_step in versions])
    fresh = np.ones(len(versions), bool) if limit is None else version - oldest <= limit
    return fresh if fresh.any() else np.ones(len(versions), bool)
