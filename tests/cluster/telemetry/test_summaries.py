"""What a run reports of its episodes, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.trajectory import INFRASTRUCTURE_END_REASONS, TrajectoryBatch
from cluster.telemetry.summaries import episode_metrics, episode_returns, lag_metrics
from tests.actors.episodes import episode

ENDS = ["terminated", "truncated", *sorted(INFRASTRUCTURE_END_REASONS)]


def test_success_is_a_positive_return_and_task_success_is_what_the_environment_says() -> None:
    batch = TrajectoryBatch.concatenate(
        [
            episode("a", [-1.0, 1.0], success=True),  # reached the goal after a wrong step: return 0 is no success
            episode("b", [0.0, 1.0], success=True),
            episode("c", [2.0], end_reason="truncated"),  # earned something and accomplished nothing
        ]
    )
    metrics = episode_metrics(batch, "rollout")
    assert metrics["rollout/success"] == pytest.approx(2 / 3)
    assert metrics["rollout/task_success"] == pytest.approx(2 / 3)
    assert metrics["rollout/return"] == pytest.approx(1.0)
    assert episode_returns(batch).tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("reason", sorted(INFRASTRUCTURE_END_REASONS))
def test_an_infrastructure_failure_is_neither_success_nor_failure(reason: str) -> None:
    batch = TrajectoryBatch.concatenate(
        [episode("good", [1.0], success=True), episode("lost", [-1.0, -1.0], end_reason=reason)]
    )
    metrics = episode_metrics(batch, "evaluation")
    assert metrics["evaluation/success"] == metrics["evaluation/task_success"] == metrics["evaluation/return"] == 1.0
    assert metrics["evaluation/episodes"] == 2.0 and metrics["evaluation/environment_failures"] == 1.0


def test_nothing_but_failures_and_nothing_at_all_give_numbers_too() -> None:
    lost = episode_metrics(episode("lost", [1.0], end_reason="environment_died"), "x")
    assert lost["x/success"] == lost["x/return"] == 0.0 and lost["x/environment_failures"] == 1.0
    assert set(episode_metrics(TrajectoryBatch.empty(), "x").values()) == {0.0}
    nothing = {"lag/mean": 0.0, "lag/max": 0.0, "steps/trained": 0.0, "steps/dropped": 0.0}
    assert lag_metrics(TrajectoryBatch.empty(), 3, 1) == nothing


@st.composite
def episodes(draw: st.DrawFn) -> list[TrajectoryBatch]:
    batches = []
    for number in range(draw(st.integers(1, 5))):
        steps = draw(st.integers(1, 4))

        def each(of: st.SearchStrategy, steps: int = steps) -> list:
            return draw(st.lists(of, min_size=steps, max_size=steps))

        batches.append(
            episode(
                f"e{number}",
                each(st.integers(-2, 2).map(float)),
                end_reason=draw(st.sampled_from(ENDS)),
                success=draw(st.booleans()),
                valid=each(st.booleans()),
                responses=each(st.integers(0, 6)),
                finish=each(st.sampled_from(["stop", "length"])),
                versions=each(st.lists(st.integers(0, 9), min_size=1, max_size=3)),
            )
        )
    return batches


@settings(max_examples=60, deadline=None)
@given(batches=episodes())
def test_the_rates_are_what_counting_row_by_row_gives(batches: list[TrajectoryBatch]) -> None:
    played = [batch.steps.to_pylist() for batch in batches]
    judged = [rows for rows in played if rows[-1]["end_reason"] not in INFRASTRUCTURE_END_REASONS]
    rows = [row for episode_rows in played for row in episode_rows]

    def mean(values: list) -> float:
        return sum(values) / len(values) if values else 0.0

    returns = [sum(row["reward"] for row in episode_rows) for episode_rows in judged]
    expected = {
        "r/success": mean([value > 0 for value in returns]),
        "r/task_success": mean([episode_rows[-1]["success"] for episode_rows in judged]),
        "r/return": mean(returns),
        "r/episodes": len(played),
        "r/environment_failures": len(played) - len(judged),
        "r/steps": len(rows),
        "r/episode_length": len(rows) / len(played),
        "r/valid_rate": mean([row["valid"] for row in rows]),
        "r/response_tokens": mean([len(row["response_ids"]) for row in rows]),
        "r/cut_off_rate": mean([row["finish_reason"] == "length" for row in rows]),
    }
    assert episode_metrics(TrajectoryBatch.concatenate(batches), "r") == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(batches=episodes(), version=st.integers(9, 20), limit=st.none() | st.integers(0, 20))
def test_lag_is_that_of_the_oldest_token_of_each_step_trained_on(
    batches: list[TrajectoryBatch], version: int, limit: int | None
) -> None:
    batch = TrajectoryBatch.concatenate(batches)
    lags = [version - min(span["version"] for span in row["policy_versions"]) for row in batch.steps.to_pylist()]
    trained = [lag for lag in lags if limit is None or lag <= limit]
    assert lag_metrics(batch, version, limit) == pytest.approx(
        {
            "lag/mean": np.mean(trained) if trained else 0.0,
            "lag/max": max(trained, default=0),
            "steps/trained": len(trained),
            "steps/dropped": len(lags) - len(trained),
        }
    )
