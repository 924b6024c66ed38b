"""`coso alfworld`: a folder of games from nothing, whole or not at all, and a check that names what is broken."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.errors import CosoError
from envs.alfworld.games import DATA_FOLDER, GAME_FILE, list_games

pytestmark = pytest.mark.integration

MAKE = ["alfworld", "make", "--floor-plan", "305", "--floor-plan", "308", "--task", "pick_and_place_simple",
        "--workers", "1", "--train", "2", "--unseen", "1"]  # fmt: skip


def invoke(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("made") / "games"
    return folder, json.loads(invoke(*MAKE, str(folder)))


def test_games_of_the_scope_are_made_and_counted(made: tuple[Path, dict]) -> None:
    folder, summary = made
    assert summary["games"] == {split: {"pick_and_place_simple": n} for split, n in
                                (("train", 2), ("seen", 1), ("unseen", 1))}  # fmt: skip
    assert summary["in_all"] == 4 and summary["expert_steps"]["largest"] <= 50
    assert {path.floor_plan for path in list_games(folder, "train")} == {305}
    assert {path.floor_plan for path in list_games(folder, "unseen")} == {308}
    assert json.loads((folder / "made.json").read_text()) == summary
    assert [path.name for path in folder.parent.iterdir()] == ["games"]


def test_a_folder_that_exists_is_kept(made: tuple[Path, dict]) -> None:
    folder, _ = made
    with pytest.raises(CosoError, match="--overwrite"):
        invoke(*MAKE, str(folder))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "cook"], "is unknown; choose one of"),
        (["--floor-plan", "119"], "does not exist"),
        (["--floor-plan", "401", "--task", "look_at_obj_in_light"], "no game can be made"),
    ],
)
def test_a_wrong_scope_is_told(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(CosoError, match=message):
        invoke("alfworld", "make", str(tmp_path / "games"), *words)


def test_check_counts_and_lets_the_expert_play(made: tuple[Path, dict]) -> None:
    checked = json.loads(invoke("alfworld", "check", str(made[0]), "--play", "--workers", "1"))
    assert (checked["games"], checked["bad"], checked["won_by_expert"]) == (4, {}, 4)


def test_check_names_what_is_broken(tmp_path: Path, made: tuple[Path, dict]) -> None:
    folder = tmp_path / "games"
    shutil.copytree(made[0], folder)
    broken = list_games(folder, "unseen")[0]
    (folder / DATA_FOLDER / broken.name / GAME_FILE).write_text("")
    result = CliRunner().invoke(app, ["alfworld", "check", str(folder), "--workers", "1"])
    assert isinstance(result.exception, CosoError) and "1 of 4" in str(result.exception)
    assert "not JSON" in json.loads(result.stdout)["bad"][broken.name]
    with pytest.raises(CosoError, match="no ALFWorld games"):
        invoke("alfworld", "check", str(tmp_path / "nothing"))
