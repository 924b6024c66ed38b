"""Metrics of a batch of episodes: rollouts, evaluations and policy lag."""

from __future__ import annotations

import numpy as np

from actors.trajectory import FAILED_END_REASONS, INFRASTRUCTURE_END_REASONS, REFUSAL_END_REASONS, TrajectoryBatch


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


def lag_metrics(batch: TrajectoryBatch, version: int) -> dict[str, float]:
    """Policy lag of the steps: `version` (the one being trained) minus the version of a step's oldest token."""
    lag = version - batch.behaviour_versions()
    return {"lag/mean": _mean(lag), "lag/max": float(lag.max(initial=0))}


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0
