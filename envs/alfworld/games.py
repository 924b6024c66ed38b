"""Find, read and check game files on disk, in the layout of the published data set.

    FOLDER/json_2.1.1/{train,valid_seen,valid_unseen}/TASK-Object-None-Receptacle-PLAN/TRIAL/
        traj_data.json, game.tw-pddl

`coso alfworld make` writes such a folder. ALFWORLD_DATA names the folder of the published data set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.alfworld.engine import BadGame
from envs.alfworld.names import SPLITS, TASKS, room_of
from envs.alfworld.scene import Goal

DATA_FOLDER = "json_2.1.1"
GAME_FILE, TRAJECTORY_FILE = "game.tw-pddl", "traj_data.json"
#: Default folder of games, without an argument or ALFWORLD_DATA.
DEFAULT_FOLDER = "games/alfworld"


class NoGames(ValueError):
    """No games were found; the message says where and what to do."""


@dataclass(frozen=True)
class GamePath:
    """One game of a folder, described by its path."""

    folder: Path
    name: str  # "train/pick_and_place_simple-Mug-None-Desk-308/trial_1", the path below the data folder
    task: str
    floor_plan: int

    @property
    def room(self) -> str:
        """The kind of room, for instance "kitchen"."""
        return room_of(self.floor_plan)


@dataclass(frozen=True)
class GameFile:
    """The content of a game's two files."""

    path: GamePath
    game: dict[str, Any]  # pddl_domain, grammar, pddl_problem, solvable, walkthrough
    trajectory: dict[str, Any]
    goal: Goal


def games_folder(folder: str | None) -> Path:
    """The folder of games: `folder`, else ALFWORLD_DATA if it holds a data set, else the default."""
    if folder is not None:
        return Path(folder).expanduser()
    published = os.environ.get("ALFWORLD_DATA")
    if published and (Path(published) / DATA_FOLDER).is_dir():
        return Path(published)
    return Path(DEFAULT_FOLDER)


def list_games(
    folder: Path, split: str, tasks: Sequence[str] = (), rooms: Sequence[str] = (), floor_plans: Sequence[int] = ()
) -> list[GamePath]:
    """The games of a split, sorted by name, with the given tasks, rooms and floor plans (empty: all).

    Tasks that ALFWorld leaves out (movable receptacles, sliced things) are left out too. Raises `NoGames`.
    """
    below = folder / DATA_FOLDER / SPLITS[split]
    found = []
    for file in sorted(below.glob(f"*/*/{TRAJECTORY_FILE}")):
        task, _, rest = file.parent.parent.name.partition("-")
        plan = rest.rpartition("-")[2]
        if task not in TASKS or "Sliced" in rest or not plan.isdigit():
            continue
        try:
            path = GamePath(folder, str(file.parent.relative_to(folder / DATA_FOLDER)), task, int(plan))
            fits = (not rooms or path.room in rooms) and (not floor_plans or path.floor_plan in floor_plans)
        except ValueError:
            continue
        if fits and (not tasks or task in tasks):
            found.append(path)
    if not found:
        asked = [*tasks, *rooms, *(f"FloorPlan{plan}" for plan in floor_plans)]
        raise NoGames(
            f"no ALFWorld games{' of ' + ', '.join(asked) if asked else ''} below {below}; make some with "
            f"`coso alfworld make {folder}`, or set ALFWORLD_DATA to the folder of the published data set"
        )
    return found


def read_game(path: GamePath) -> GameFile:
    """Read a game's files. Raises `BadGame` if one is missing or broken, or if the game is not marked solvable."""
    trajectory = _read_json(path, TRAJECTORY_FILE)
    game = _read_json(path, GAME_FILE)
    if not game.get("solvable"):
        # The engine skips both kinds: games that could not be solved, and games that were not tried.
        why = "it is marked unsolvable" if "solvable" in game else "it is not marked solvable"
        raise BadGame(f"{path.name}/{GAME_FILE}: {why}")
    try:
        return GameFile(path, game, trajectory, goal_of(trajectory))
    except BadGame as error:
        raise BadGame(f"{path.name}/{TRAJECTORY_FILE}: {error}") from None


def goal_of(trajectory: dict[str, Any]) -> Goal:
    """The goal that a `traj_data.json` states. Raises `BadGame`."""
    try:
        names = trajectory["pddl_params"]
        target, receptacle, lamp = (
            str(names[key] or "").lower() for key in ("object_target", "parent_target", "toggle_target")
        )
        task = trajectory["task_type"]
    except (KeyError, TypeError) as error:
        raise BadGame(f"it has no {error}") from None
    if task not in TASKS or not target:
        raise BadGame(f"ALFWorld has no task {task!r} with object {target!r}")
    return Goal(task, target, receptacle, lamp)


def _read_json(path: GamePath, name: str) -> dict[str, Any]:
    file = path.folder / DATA_FOLDER / path.name / name
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise BadGame(f"{path.name}/{name}: {error.strerror or error}") from None
    except ValueError as error:
        raise BadGame(f"{path.name}/{name}: it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadGame(f"{path.name}/{name}: it is not a JSON object")
    return content
