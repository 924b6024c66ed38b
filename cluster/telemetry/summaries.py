"""Metrics of a batch of episodes: rollouts, evaluations, policy lag and calibration of the policy."""

from __future__ import annotations

from collections import Counter

import numpy as np

from actors.trajectory import FAILED_END_REASONS, INFRASTRUCTURE_END_REASONS, REFUSAL_END_REASONS, TrajectoryBatch
from scoring.calibration import of_probabilities

#: Fewer answers to one prompt and image say too little of how sure the policy is.
FEWEST_REPEATS = 4


def episode_returns(batch: TrajectoryBatch) -> np.ndarray:
    """float64 (episodes,): undiscounted sum of rewards."""
    rewards = batch.column("reward").astype(np.float64)
    return np.array([rewards[piece].sum() for piece in batch.episode_slices()])


def episode_metrics(batch: TrajectoryBatch, prefix: str) -> dict[str, float]:
    """Metrics of success, return, length and answer format, with keys `prefix/NAME`.

    `success` is the published measure, return > 0; `task_success` is what the environment itself calls success.
    Episodes that a failed environment or a refused request cut off count in none of the rates, since their outcome is
    unknown.
    """
    slices = batch.episode_slices()
    ends = [batch.column("end_reason")[piece.stop - 1] for piece in slices]
    judged = [i for i, end in enumerate(ends) if end not in FAILED_END_REASONS]
    returns = episode_returns(batch)[judged]
    success = batch.column("success")
    lengths = np.array([piece.stop - piece.start for piece in slices])
    response_lengths = np.array([len(ids) for ids in batch.ragged("response_ids", np.int32)])
    finish = batch.column("finish_reason")
    return {
        f"{prefix}/success": _mean(returns > 0),
        f"{prefix}/task_success": _mean(np.array([bool(success[slices[i].stop - 1]) for i in judged])),
        f"{prefix}/return": _mean(returns),
        f"{prefix}/episodes": float(len(slices)),
        f"{prefix}/environment_failures": float(sum(end in INFRASTRUCTURE_END_REASONS for end in ends)),
        **{f"{prefix}/{reason}": float(ends.count(reason)) for reason in sorted(REFUSAL_END_REASONS)},
        f"{prefix}/steps": float(len(batch)),
        f"{prefix}/episode_length": _mean(lengths),
        f"{prefix}/valid_rate": _mean(batch.column("valid").astype(bool)),
        f"{prefix}/response_tokens": _mean(response_lengths),
        f"{prefix}/cut_off_rate": _mean(finish == "length"),
    }


def policy_calibration(batch: TrajectoryBatch) -> dict[str, float]:
    """How sure the policy is of an action, against the success of the episode that it took it in.

    Where at least `FEWEST_REPEATS` steps have the same prompt and image, a step's confidence is the share of the other
    ones that took its action (answers that do not parse are one action). Its outcome is whether its episode's return is
    above 0. Returns `policy/ece`, `policy/confidence`, `policy/repeated` (steps measured) and the points of the curve;
    only `policy/repeated` where there is no such step. Steps of episodes that a failed environment cut off have no
    outcome, but count among the others.
    """
    columns = (batch.column(name).tolist() for name in ("prompt", "image", "action"))
    states, taken = [], []
    for prompt, image, action in zip(*columns, strict=True):
        states.append((prompt, image))
        taken.append((prompt, image, action))
    of_state, of_action = Counter(states), Counter(taken)
    ends, succeeded = batch.column("end_reason"), np.zeros(len(batch), bool)
    known = np.array([of_state[state] >= FEWEST_REPEATS for state in states], dtype=bool)
    for piece, total in zip(batch.episode_slices(), episode_returns(batch), strict=True):
        succeeded[piece] = total > 0
        if ends[piece.stop - 1] in INFRASTRUCTURE_END_REASONS:
            known[piece] = False
    row = {"policy/repeated": float(known.sum())}
    if not known.any():
        return row
    confidence = [(of_action[taken[i]] - 1) / (of_state[states[i]] - 1) for i in np.flatnonzero(known)]
    curve = of_probabilities(confidence, succeeded[known])
    return row | {
        "policy/ece": curve.error,
        "policy/confidence": _mean(np.array(confidence)),
        **curve.metrics("policy/"),
    }


def lag_metrics(batch: TrajectoryBatch, version: int, limit: int | None) -> dict[str, float]:
    """Policy lag of the steps trained on: `version` (the one being trained) minus the version of a step's oldest token.
    limit: steps with a larger lag give context only; None: all are trained on. `steps/trained` and `steps/dropped`
    count both kinds."""
    lag = version - batch.behaviour_versions()
    trained = lag if limit is None else lag[lag <= limit]
    return {
        "lag/mean": _mean(trained),
        "lag/max": float(trained.max(initial=0)),
        "steps/trained": float(len(trained)),
        "steps/dropped": float(len(lag) - len(trained)),
    }


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0
