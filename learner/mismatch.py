"""How far the learner's log-probabilities are from those the engine sampled with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.trajectory import TrajectoryBatch


def token_versions(trajectories: TrajectoryBatch) -> list[np.ndarray]:
    """int32 (n,) per step: the policy version that made each response token."""
    versions = []
    lengths = [len(ids) for ids in trajectories.ragged("response_ids", np.int32)]
    for spans, length in zip(trajectories.steps["policy_versions"].to_pylist(), lengths, strict=True):
        of_step = np.zeros(length, np.int32)
        for span in spans or ():
            of_step[span["start"] :] = span["version"]
        versions.append(of_step)
    return versions


def mismatch_metrics(
    current: Sequence[np.ndarray], behaviour: Sequence[np.ndarray], versions: Sequence[np.ndarray], version: int
) -> dict[str, float]:
    """Log-probabilities (nats) of the same tokens by the learner (`current`) and when sampled (`behaviour`).

    Over tokens made by the learner's present weights (`version`) a difference is engine against learner and should be
    rounding only: `mismatch_mean`, `mismatch_max` of |Δ|, `mismatch_kl`, `mismatch_tokens` (how many there were; with
    none the others are left out). Over all tokens it is how far the policy has moved since: `drift_mean`,
    `drift_max`, `drift_kl`. KL(behaviour ‖ current) by the k3 estimator e^Δ − 1 − Δ, Δ = current − behaviour
    (Schulman 2020, "Approximating KL divergence"): never negative, unbiased under samples of the behaviour policy.
    """
    difference = _flat(current) - _flat(behaviour)
    present = np.concatenate([np.asarray(of_step) == version for of_step in versions] or [np.empty(0, bool)])
    metrics = {"mismatch_tokens": float(present.sum())}
    for name, delta in (("mismatch", difference[present]), ("drift", difference)):
        if len(delta):
            metrics[f"{name}_mean"] = float(np.abs(delta).mean())
            metrics[f"{name}_max"] = float(np.abs(delta).max())
            metrics[f"{name}_kl"] = float((np.expm1(delta) - delta).mean())
    return metrics


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(array, np.float64) for array in arrays] or [np.empty(0)])
