"""Metrics of a batch of episodes: rollouts, evaluations and policy lag."""

from __future__ import annotations

import numpy as np

from actors.trajectory import INFRASTRUCTURE_END_REASONS, TrajectoryBatch


def episode_returns(batch: TrajectoryBatch) -> np.ndarray:
    """float64 (episodes,): undiscounted sum of rewards."""
    rewards = batch.column("reward").astype(np.float64)
    return np.array([rewards[piece].sum() for piece in batch.episode_slices()])


def episode_metrics(batch: TrajectoryBatch, prefix: str) -> dict[str, float]:
    """Metrics of success, return, length and answer format, with keys `prefix/NAME`.

    `success` is the published measure, return > 0; `task_success` is what the environment itself calls success.
    Episodes that a failed environment cut off count in none of the rates, since their outcome is unknown.
    """
    slices = batch.episode_slices()
    ends = batch.column("end_reason")
    judged = [i for i, piece in enumerate(slices) if ends[piece.stop - 1] not in INFRASTRUCTURE_END_REASONS]
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
        f"{prefix}/environment_failures": float(len(slices) - len(judged)),
        f"{prefix}/steps": float(len(batch)),
        f"{prefix}/episode_length": _mean(lengths),
        f"{prefix}/valid_rate": _mean(batch.column("valid").astype(bool)),
        f"{prefix}/response_tokens": _mean(response_lengths),
        f"{prefix}/cut_off_rate": _mean(finish == "length"),
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
