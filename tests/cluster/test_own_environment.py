"""A user's own environment: the very example of docs/environments.md, from its class to its training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from actors.trajectory import TrajectoryLog
from cluster.run.run_folder import RunFolder
from cluster.telemetry.metrics import read_metrics
from tests.cluster.conftest import TINY, Coso

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"


def example(language: str, first_line: str) -> str:
    """The page's code block of a language that begins with a line."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(first_line + "\n")]
    return found


def test_the_example_is_under_forty_lines() -> None:
    assert len(example("python", "# light_switch.py").splitlines()) < 40


@pytest.mark.end_to_end
@pytest.mark.timeout(400)
def test_the_example_is_shown_by_its_expert_taught_and_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "light_switch.py").write_text(example("python", "# light_switch.py"), encoding="utf-8")
    settings = example("yaml", "# lamp.yaml")
    (tmp_path / "lamp.yaml").write_text(settings, encoding="utf-8")
    env_id = yaml.safe_load(settings)["environment"]["id"]
    coso = Coso(tmp_path / "runs", tmp_path / "model")

    shown = coso.run("demos", env_id, "60", str(tmp_path / "demos"), "--noise", "0.6", "--habit", "press")
    assert "60 steps" in shown
    demonstrations = TrajectoryLog(tmp_path / "demos").read(0)
    assert set(demonstrations.column("action")) == {"press", "wait"} and len(demonstrations.images) == 2

    words = [
        *TINY,
        str(tmp_path / "lamp.yaml"),
        f"folder={coso.folder}",
        f"model.path={coso.folder / 'model'}",
        f"warm_start.output={coso.folder / 'model'}",
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
