"""The example of an algorithm of one's own: short, and it trains through the command, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.telemetry.metrics import read_metrics
from tests.cluster.conftest import Coso

FILE = Path(__file__).parents[2] / "examples" / "own_algorithm" / "reinforce.py"


def test_it_is_one_file_of_under_sixty_lines() -> None:
    """Lines of code: without the module's docstring, blank lines and imports."""
    lines = [line for line in FILE.read_text().split('"""', 2)[2].splitlines() if line.strip()]
    assert len([line for line in lines if not line.startswith(("from", "import", "if TYPE", "    from"))]) < 60


def test_the_example_algorithm_trains(coso: Coso) -> None:
    words = [
        "algorithm.name=examples.own_algorithm.reinforce:Reinforce",
        "algorithm.discount=0.8",
        "training.updates=2",
        "training.checkpoint_every=1",
        "mode=sync",
    ]
    run = coso.train("own", *words)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["update"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert row["learner/gradient_norm"] > 0 and row["learner/optimizer_steps"] >= 1
        assert "learner/policy_loss" in row and "learner/value_loss" not in row
    assert "discount: 0.8" in (run / "config.yaml").read_text()
    record = json.loads((run / "checkpoints" / "step_2" / "learner" / "learner.json").read_text())
    assert "baseline" in record["algorithm"]
    coso.run("resume", str(run), "--updates", "3")
    assert read_metrics(run / "metrics.jsonl")[-1]["update"] == 3
