"""A game of one's own, from its class to its training: examples/own_game."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from actors.trajectory import TrajectoryLog
from cluster.run.run_folder import RunFolder
from cluster.telemetry.metrics import read_metrics
from tests.cluster.conftest import TINY, Coso

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_game"


def test_the_example_is_under_forty_lines() -> None:
    assert len((EXAMPLE / "light_switch.py").read_text(encoding="utf-8").splitlines()) < 40


@pytest.mark.end_to_end
@pytest.mark.timeout(400)
def test_the_example_is_shown_by_its_expert_taught_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLE), prepend=":")
    env_id = yaml.safe_load((EXAMPLE / "lamp.yaml").read_text(encoding="utf-8"))["environment"]["id"]
    coso = Coso(tmp_path / "runs", tmp_path / "model")

    shown = coso.run("demos", env_id, "60", str(tmp_path / "demos"), "--noise", "0.6", "--habit", "press")
    assert "60 steps" in shown
    demonstrations = TrajectoryLog(tmp_path / "demos").read(0)
    assert set(demonstrations.column("action")) == {"press", "wait"} and len(demonstrations.images) == 2

    words = [
        *TINY,
        str(EXAMPLE / "lamp.yaml"),
        f"folder={coso.folder}",
        f"model.path={coso.folder / 'model'}",
        f"warm_start.output={coso.folder / 'model'}",
        "training.evaluation_episodes=8",
    ]
    coso.run(
        "warmstart",
        *words,
        f"warm_start.demonstrations_from={tmp_path / 'demos'}",
        "warm_start.steps=60",
        "warm_start.vision_steps=5",
    )
    coso.run("train", *words, "training.updates=1")
    run = RunFolder.open_existing(coso.folder / "lamp")
    (before, after) = read_metrics(run.path / "metrics.jsonl")
    assert after["rollout/valid_rate"] > 0.5, "the model has learnt the example's answer format"
    trained_on = TrajectoryLog(run.path / "trajectories").read(1)
    assert set(trained_on.column("environment")) == {env_id}
    assert set(trained_on.column("action")) <= {"press", "wait", ""}
    assert all(prompt.startswith("Switch the lamp on. Answer in JSON:") for prompt in trained_on.column("prompt"))
