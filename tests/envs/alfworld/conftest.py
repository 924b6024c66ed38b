"""One folder of small real games for all tests of this family: every task type, every kind of room."""

from pathlib import Path

import pytest

from envs.alfworld.building import build_game
from envs.alfworld.games import GameFile, list_games, read_game
from envs.alfworld.making import GameRequest

SEED = 11
#: (split, floor plan, task type)
MADE = (
    ("train", 305, "pick_and_place_simple"),
    ("train", 301, "look_at_obj_in_light"),
    ("train", 401, "pick_clean_then_place_in_recep"),
    ("train", 2, "pick_heat_then_place_in_recep"),
    ("train", 3, "pick_cool_then_place_in_recep"),
    ("train", 203, "pick_two_obj_and_place"),
    ("seen", 305, "pick_and_place_simple"),
    ("unseen", 308, "pick_and_place_simple"),
)


@pytest.fixture(scope="session")
def games_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training games, one of every task type, one seen and one unseen game."""
    folder = tmp_path_factory.mktemp("alfworld")
    for split, plan, task in MADE:
        outcome = build_game(GameRequest(split, plan, task, 0, SEED), folder, horizon=50)
        assert outcome.steps is not None, outcome
    return folder


@pytest.fixture(scope="session")
def games(games_folder: Path) -> list[GameFile]:
    """The six training games, read."""
    return [read_game(path) for path in list_games(games_folder, "train")]
