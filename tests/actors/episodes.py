"""Small episodes as rows of the trajectory schema, for tests of what carries and counts them."""

from __future__ import annotations

from typing import Any

from actors.trajectory import TrajectoryBatch


def episode(
    name: str,
    rewards: list[float],
    *,
    seed: int = 1,
    end_reason: str = "terminated",
    success: bool = False,
    versions: list[list[int]] | None = None,
    valid: list[bool] | None = None,
    responses: list[int] | None = None,
    finish: list[str] | None = None,
    image: bytes = b"",
) -> TrajectoryBatch:
    """One episode of `len(rewards)` steps; `versions`: the policy versions that made each step's tokens; `responses`:
    tokens of each answer; `image`: what all its steps show."""
    steps = len(rewards)
    versions = versions or [[0]] * steps
    valid = valid or [True] * steps
    responses = responses or [3] * steps
    finish = finish or ["stop"] * steps
    rows: list[dict[str, Any]] = []
    for step in range(steps):
        last = step == steps - 1
        rows.append(
            {
                "run": "test",
                "episode": name,
                "environment": "test",
                "worker": 0,
                "slot": 0,
                "step": step,
                "seed": seed,
                "prompt": "p",
                "image": f"image-{name}",
                "prompt_ids": [1, 2],
                "response_ids": list(range(responses[step])),
                "behaviour_logprobs": [-1.0] * responses[step],
                "policy_versions": [{"version": v, "start": i} for i, v in enumerate(versions[step])],
                "finish_reason": finish[step],
                "utterance": "u",
                "action": "+",
                "action_labels": [1],
                "valid": valid[step],
                "reward": rewards[step],
                "terminated": last and end_reason == "terminated",
                "truncated": last and end_reason != "terminated",
                "success": last and success,
                "end_reason": end_reason if last else "",
                "generate_seconds": 0.1,
                "environment_seconds": 0.1,
            }
        )
    return TrajectoryBatch.from_rows(rows, {f"image-{name}": image} if image else {})
