"""What a run reports of its episodes, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.trajectory import FAILED_END_REASONS, INFRASTRUCTURE_END_REASONS, REFUSAL_END_REASONS, TrajectoryBatch
from cluster.telemetry.summaries import episode_metrics, episode_returns, lag_metrics, policy_calibration
from scoring.calibration import of_probabilities
from tests.actors.episodes import episode

ENDS = ["terminated", "truncated", *sorted(FAILED_END_REASONS)]


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


@pytest.mark.parametrize("reason", sorted(REFUSAL_END_REASONS))
def test_a_refused_request_is_neither_success_nor_failure_and_counted_by_its_reason(reason: str) -> None:
    batch = TrajectoryBatch.concatenate(
        [episode("good", [1.0], success=True), episode("lost", [-1.0, -1.0], end_reason=reason)]
    )
    metrics = episode_metrics(batch, "rollout")
    assert metrics["rollout/success"] == metrics["rollout/task_success"] == metrics["rollout/return"] == 1.0
    assert {name for name in (*REFUSAL_END_REASONS, "environment_failures") if metrics[f"rollout/{name}"]} == {reason}


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
    judged = [rows for rows in played if rows[-1]["end_reason"] not in FAILED_END_REASONS]
    ends = [rows[-1]["end_reason"] for rows in played]
    rows = [row for episode_rows in played for row in episode_rows]

    def mean(values: list) -> float:
        return sum(values) / len(values) if values else 0.0

    returns = [sum(row["reward"] for row in episode_rows) for episode_rows in judged]
    expected = {
        "r/success": mean([value > 0 for value in returns]),
        "r/task_success": mean([episode_rows[-1]["success"] for episode_rows in judged]),
        "r/return": mean(returns),
        "r/episodes": len(played),
        "r/environment_failures": sum(end.startswith("environment_") for end in ends),
        **{f"r/{reason}": ends.count(reason) for reason in REFUSAL_END_REASONS},
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


@st.composite
def repeated_states(draw: st.DrawFn) -> TrajectoryBatch:
    rows = []
    for number in range(draw(st.integers(1, 12))):
        steps = draw(st.integers(1, 3))
        played = episode(
            f"e{number}", [draw(st.sampled_from([-1.0, 0.0, 1.0])) for _ in range(steps)], end_reason=draw(end_reasons)
        )
        for row in played.steps.to_pylist():
            rows.append(row | {name: draw(st.sampled_from(values)) for name, values in CHOICES.items()})
    return TrajectoryBatch.from_rows(rows, {})


end_reasons = st.sampled_from(["terminated", "terminated", "terminated", "environment_died"])
CHOICES = {"prompt": ["p", "q"], "image": ["i", "j"], "action": ["+", "-", ""]}


@settings(max_examples=100, deadline=None)
@given(batch=repeated_states())
def test_confidence_is_the_share_of_the_other_answers_with_the_same_action(batch: TrajectoryBatch) -> None:
    rows = batch.steps.to_pylist()
    confidences, outcomes = [], []
    for row in rows:
        others = [
            other
            for other in rows
            if other is not row and (other["prompt"], other["image"]) == (row["prompt"], row["image"])
        ]
        own = [each for each in rows if each["episode"] == row["episode"]]
        if len(others) >= 3 and own[-1]["end_reason"] == "terminated":
            confidences.append(sum(other["action"] == row["action"] for other in others) / len(others))
            outcomes.append(sum(each["reward"] for each in own) > 0)
    found = policy_calibration(batch)
    assert found["policy/repeated"] == len(confidences)
    if confidences:
        curve = of_probabilities(confidences, outcomes)
        assert found["policy/ece"] == pytest.approx(curve.error)
        assert found["policy/confidence"] == pytest.approx(np.mean(confidences))
        assert found.items() >= curve.metrics("policy/").items()
    else:
        assert len(found) == 1


def test_a_policy_that_is_sure_and_wrong_is_badly_calibrated() -> None:
    wrong = TrajectoryBatch.concatenate([episode(f"e{i}", [-1.0]) for i in range(6)])
    steps = wrong.steps.set_column(wrong.steps.schema.get_field_index("image"), "image", [["same"] * 6])
    assert policy_calibration(TrajectoryBatch(steps))["policy/ece"] == 1.0
    assert policy_calibration(wrong) == {"policy/repeated": 0.0}  # every episode shows another image
    assert policy_calibration(TrajectoryBatch.empty()) == {"policy/repeated": 0.0}
