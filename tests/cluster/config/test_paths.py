"""Paths are absolute before a run begins, so that it can be resumed from another folder."""

from pathlib import Path

import pytest

from cluster.config.files import validate
from cluster.config.paths import absolute_paths


def test_every_path_is_absolute_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models/start", "general"):
        Path(name).mkdir(parents=True)
    Path("tasks.txt").touch()
    kwargs = {"tasks": "tasks.txt", "driver": "general", "horizon": 3, "games": "org/none", "folder": "models/start"}
    config = validate(
        {
            "model": {"path": "models/start"},
            "environment": {"id": "module:Own-v0", "kwargs": kwargs},
            "warm_start": {"output": "out", "demonstrations_from": "demos"},
        }
    )
    absolute = absolute_paths(config)
    assert absolute.folder == f"{tmp_path}/runs" and absolute.model.path == f"{tmp_path}/models/start"
    assert absolute.environment.kwargs == kwargs | {
        "tasks": f"{tmp_path}/tasks.txt",
        "folder": f"{tmp_path}/models/start",
    }
    assert absolute.warm_start.output == f"{tmp_path}/out"
    assert absolute.warm_start.demonstrations_from == f"{tmp_path}/demos"
    monkeypatch.chdir("/")
    assert absolute_paths(absolute) == absolute


def test_what_is_no_path_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = validate({"model": {"path": "org/model"}, "environment": {"kwargs": {"text": "a\0/b"}}})
    absolute = absolute_paths(config)
    assert absolute.model == config.model and absolute.environment == config.environment
    assert absolute.warm_start.demonstrations_from == ""


@pytest.mark.parametrize("how", ["argument", "variable", "default"])
def test_alfworlds_games_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "json_2.1.1").mkdir(parents=True)
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    if how == "variable":
        monkeypatch.setenv("ALFWORLD_DATA", "data")
    kwargs = {"games": "data"} if how == "argument" else {}
    config = absolute_paths(validate({"environment": {"id": "coso/ALFWorld-v0", "kwargs": kwargs}}))
    assert config.environment.kwargs == {"games": f"{tmp_path}/{'games/alfworld' if how == 'default' else 'data'}"}
