"""Build solvable games: make a game, have the expert solve it, write it to a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from envs.alfworld.engine import BadGame, Engine
from envs.alfworld.expert import play_expert
from envs.alfworld.games import DATA_FOLDER, GAME_FILE, TRAJECTORY_FILE, GameFile, GamePath, goal_of, read_game
from envs.alfworld.making import CannotBeMade, GameRequest, MadeGame, make_game
from envs.alfworld.names import SPLITS

#: Most games made for a request before giving up.
ATTEMPTS = 5


@dataclass(frozen=True)
class BuildOutcome:
    """The result of a request: `steps` the expert needed (None: no game), and the games it did not solve."""

    request: GameRequest
    steps: int | None
    unsolved: tuple[str, ...]
    problem: str = ""


def build_game(request: GameRequest, folder: Path, horizon: int) -> BuildOutcome:
    """Make a game and write it below `folder` if the expert wins it within `horizon` steps.

    If it does not win, make another game for the request, up to `ATTEMPTS` times.
    """
    unsolved: list[str] = []
    for attempt in range(ATTEMPTS):
        try:
            made = make_game(replace(request, attempt=attempt))
            commands = play_expert(as_game_file(made), _engine(), horizon)
        except (CannotBeMade, BadGame) as error:
            return BuildOutcome(request, None, tuple(unsolved), str(error))
        if commands is not None:
            _write(made, commands, folder)
            return BuildOutcome(request, len(commands), tuple(unsolved))
        unsolved.append(f"{made.name}/{request.trial} (attempt {attempt + 1})")
    return BuildOutcome(request, None, tuple(unsolved), f"the expert solved none of {ATTEMPTS} games")


def as_game_file(made: MadeGame) -> GameFile:
    """Convert a made game to the form of a game read from a file."""
    name = f"{SPLITS[made.request.split]}/{made.name}/{made.request.trial}"
    path = GamePath(Path(), name, made.request.task, made.request.floor_plan)
    return GameFile(path, made.game, made.trajectory, goal_of(made.trajectory))


@lru_cache(maxsize=1)
def _engine() -> Engine:
    return Engine()


def _write(made: MadeGame, commands: list[str], folder: Path) -> None:
    below = folder / DATA_FOLDER / as_game_file(made).path.name
    below.mkdir(parents=True)
    game = {**made.game, "solvable": True, "walkthrough": commands}
    (below / GAME_FILE).write_text(json.dumps(game))
    (below / TRAJECTORY_FILE).write_text(json.dumps(made.trajectory, indent=1))


@dataclass(frozen=True)
class CheckOutcome:
    """The problem of a game file ("": none), and the steps of the expert's win (None: not played or not won)."""

    problem: str
    steps: int | None = None


def check_game(path: GamePath, horizon: int) -> CheckOutcome:
    """Read and load a game; if `horizon` > 0, the expert also plays it."""
    try:
        game = read_game(path)
        if horizon:
            commands = play_expert(game, _engine(), horizon)
            return CheckOutcome("", None if commands is None else len(commands))
        _engine().load(game.game)
        _engine().reset()
    except BadGame as error:
        return CheckOutcome(str(error))
    return CheckOutcome("")
