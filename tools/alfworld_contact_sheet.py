"""Make the pictures of `docs/alfworld.md`: `python -m tools.alfworld_contact_sheet GAMES docs/images/alfworld.png`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from envs.alfworld.engine import Engine
from envs.alfworld.games import list_games, read_game
from envs.alfworld.names import TASKS
from envs.alfworld.picture import SIZE, draw_scene
from envs.alfworld.scene import Scene, scene_of
from envs.drawing import bold_font

COLUMNS = 4
#: The small model's input size, pixels; every picture is also shown in this size.
SMALL = 64
_GAP, _CAPTION = 12, 26


def moments(folder: Path) -> Iterator[tuple[str, Scene]]:
    """(command, scene after it) along the solutions of some training games of every task type."""
    engine = Engine()
    for task in TASKS:
        for path in list_games(folder, "train", [task])[:5]:
            game = read_game(path)
            engine.load(game.game)
            yield "", scene_of(engine.reset().facts, path.room)
            for command in game.game["walkthrough"]:
                yield command, scene_of(engine.step(command).facts, path.room)
    engine.close()


def _begins(verb: str) -> Wanted:
    return lambda command, scene: command.startswith(verb)


Wanted = Callable[[str, Scene], bool]
#: What the sheet shows, each with the first moment that shows it.
_WANTED: tuple[Wanted, ...] = (
    lambda command, scene: command == "" and scene.room == "kitchen",
    lambda command, scene: bool(scene.places) and scene.places[0].is_open is False,
    lambda command, scene: command.startswith("open") and len(scene.things) > 1,
    lambda command, scene: command.startswith("take") and len(scene.things) > 1,
    _begins("clean"),
    _begins("heat"),
    _begins("cool"),
    lambda command, scene: command.startswith("move") and any(thing.states for thing in scene.things),
    _begins("use"),
    lambda command, scene: len(scene.things) > 5,
    lambda command, scene: len(scene.places) > 1,
    lambda command, scene: command == "" and scene.room == "livingroom",
)


def contact_sheet(folder: Path) -> Image.Image:
    """A closed and an open receptacle, many things, things in every state, two receptacles at once, whole rooms."""
    chosen: dict[int, tuple[str, Scene]] = {}
    for command, scene in moments(folder):
        for index, wanted in enumerate(_WANTED):
            if index not in chosen and wanted(command, scene):
                chosen[index] = command, scene
                break
    cell = SIZE + _GAP, SIZE + _CAPTION + SMALL + 2 * _GAP
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (command, scene) in enumerate(chosen[key] for key in sorted(chosen)):
        x, y = _GAP + index % COLUMNS * cell[0], _GAP + index // COLUMNS * cell[1]
        draw.text((x, y), command or "at the start", font=bold_font(17), fill="black")
        picture = Image.fromarray(draw_scene(scene))
        sheet.paste(picture, (x, y + _CAPTION))
        sheet.paste(picture.resize((SMALL, SMALL), Image.Resampling.LANCZOS), (x, y + _CAPTION + SIZE + 6))
    return sheet


if __name__ == "__main__":
    contact_sheet(Path(sys.argv[1])).save(sys.argv[2], optimize=True)
