"""A model of one's own, by its path: examples/own_model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from actors.trajectory import TrajectoryLog
from cluster.telemetry.metrics import read_metrics
from tests.cluster.conftest import TINY, Coso

EXAMPLE = Path("examples/own_model")

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(600)]


def test_a_model_is_made_taught_and_trained_with_adapters_by_its_path(tmp_path: Path) -> None:
    made, taught = tmp_path / "made", tmp_path / "taught"
    making = subprocess.run(
        [sys.executable, str(EXAMPLE / "make_model.py"), str(made)], capture_output=True, text=True, timeout=120
    )
    assert making.returncode == 0 and "Idefics3ForConditionalGeneration with" in making.stdout, making.stderr
    coso = Coso(tmp_path / "runs", made)
    small = [*TINY, str(EXAMPLE / "model.yaml"), f"folder={coso.folder}", "training.evaluation_episodes=4"]

    coso.run(
        "warmstart", *small, f"model.path={made}", f"warm_start.output={taught}", "learner.lora=null",
        "warm_start.demonstrations=200", "warm_start.steps=100",
    )  # fmt: skip
    assert json.loads((taught / "config.json").read_text())["text_config"]["hidden_size"] == 192, (
        "not the default model"
    )

    coso.run("train", *small, f"model.path={taught}", "training.updates=2")
    run = coso.folder / "own-model"
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[-1]["update"] == 2
    assert rows[-1]["rollout/valid_rate"] > 0.5, "the model has learnt the game's answer format"
    # The live engine gives the learner's probabilities: it has its adapters, pictures and template.
    assert max(row["sync_check/max_difference"] for row in rows[1:]) < 1e-4
    answers = TrajectoryLog(run / "trajectories").read(2).column("utterance")
    assert any(answer.startswith('{"current number":') for answer in answers)
