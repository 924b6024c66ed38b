"""The example of an algorithm of one's own trains through the command, and goes on after a resume."""

from __future__ import annotations

from cluster.telemetry.metrics import read_metrics
from tests.cluster.conftest import Coso


def test_the_example_algorithm_trains(coso: Coso) -> None:
    words = [
        "algorithm.name=examples.own_algorithm.reinforce:Reinforce",
        "algorithm.discount=0.8",
        "training.updates=2",
        "mode=sync",
    ]
    run = coso.train("own", *words)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["update"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert row["learner/gradient_norm"] > 0 and row["learner/optimizer_steps"] >= 1
        assert "learner/policy_loss" in row and "learner/value_loss" not in row
    assert "discount: 0.8" in (run / "config.yaml").read_text()
