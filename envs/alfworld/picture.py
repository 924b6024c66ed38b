"""Draw what the agent sees, 300 x 300 pixels, from the game's facts: the same scene gives the same pixels.

Every kind of thing has a badge with its own shape and colour, large enough to recognise when the picture is scaled to
64 pixels. Its name is below the badge.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from envs.alfworld.names import OBJECTS, RECEPTACLES, kind_of
from envs.alfworld.scene import Place, Scene, Thing
from envs.drawing import bold_font

SIZE = 300  # pixels, width and height

Box = tuple[int, int, int, int]  # left, top, right, bottom, pixels

_WALLS = {"kitchen": "#f6efd8", "livingroom": "#e3efe0", "bedroom": "#e4e6f5", "bathroom": "#dff1f4"}
_FLOORS = {"kitchen": "#b9a98a", "livingroom": "#9c7b5b", "bedroom": "#8d88a8", "bathroom": "#7fa3ab"}
_COLOURS = (
    "#d62728",
    "#1f77b4",
    "#2ca02c",
    "#ff9f0e",
    "#8c3fc4",
    "#8c564b",
    "#e84fb0",
    "#17becf",
    "#222222",
    "#a8b400",
)
_STATE_COLOURS = {"clean": "#00c8ff", "hot": "#ff2a00", "cool": "#0033ff"}
_INTERIOR, _SHUT, _EDGE, _LIT = "#fffdf7", "#6b4a2f", "#3a2a1c", "#ffe94a"
_KINDS = (*OBJECTS, *RECEPTACLES)
#: Corners of a shape in a box from (-1, -1) to (1, 1); every shape with every colour is 110 badges.
_SHAPES: tuple[tuple[tuple[float, float], ...] | str, ...] = (
    "disc",
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((0, -1), (1, 1), (-1, 1)),
    ((-1, -1), (1, -1), (0, 1)),
    ((0, -1), (1, 0), (0, 1), (-1, 0)),
    "ring",
    (
        (-0.35, -1),
        (0.35, -1),
        (0.35, -0.35),
        (1, -0.35),
        (1, 0.35),
        (0.35, 0.35),
        (0.35, 1),
        (-0.35, 1),
        (-0.35, 0.35),
        (-1, 0.35),
        (-1, -0.35),
        (-0.35, -0.35),
    ),
    ((-1, -0.45), (1, -0.45), (1, 0.45), (-1, 0.45)),
    ((-0.45, -1), (0.45, -1), (0.45, 1), (-0.45, 1)),
    ((-1, -1), (-0.2, -1), (-0.2, 0.3), (1, 0.3), (1, 1), (-1, 1)),
    ((-1, -1), (0, -0.3), (1, -1), (1, 1), (0, 0.3), (-1, 1)),
)


def blank_picture() -> NDArray[np.uint8]:
    """The picture without a scene: a white screen with a frame, uint8 (300, 300, 3)."""
    canvas = np.full((SIZE, SIZE, 3), 255, np.uint8)
    canvas[:4] = canvas[-4:] = canvas[:, :4] = canvas[:, -4:] = 128
    return canvas


@lru_cache(maxsize=16)
def draw_scene(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene: read-only uint8 (300, 300, 3)."""
    image = Image.new("RGB", (SIZE, SIZE), _WALLS[scene.room])
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 226, SIZE, SIZE), fill=_FLOORS[scene.room])
    if scene.places:
        width = (SIZE - 8) // len(scene.places)
        for index, place in enumerate(scene.places):
            _draw_place(draw, place, (4 + index * width, 4, 4 + (index + 1) * width - 4, 222))
    else:
        _draw_room(draw, scene)
    _draw_hand(draw, scene)
    pixels = np.asarray(image).copy()
    pixels.flags.writeable = False
    return pixels


def _draw_place(draw: ImageDraw.ImageDraw, place: Place, box: Box) -> None:
    left, top, right, bottom = box
    header = top + 42
    _badge(draw, kind_of(place.name), (left + 2, top + 2, left + 40, top + 40))
    condition = {None: "", True: " (open)", False: " (closed)"}[place.is_open]
    _write(draw, place.name + condition, (left + 44, top, right, header), 24)
    body = (left, header, right, bottom)
    if place.is_open is False:
        draw.rectangle(body, fill=_SHUT, outline=_EDGE, width=6)
        middle = (header + bottom) // 2
        draw.rectangle((right - 34, middle - 26, right - 22, middle + 26), fill="#f2d16b")
        return
    draw.rectangle(body, fill=_INTERIOR, outline=_EDGE, width=3)
    if place.is_open:
        # The door, swung to the side.
        draw.polygon([(right - 22, header), (right, header), (right, bottom), (right - 22, bottom - 14)], fill=_SHUT)
        body = (left, header, right - 24, bottom)
    _draw_grid(draw, place.things, body)


def _draw_grid(draw: ImageDraw.ImageDraw, things: tuple[Thing, ...], box: Box) -> None:
    if not things:
        return
    left, top, right, bottom = box
    # Tiles that are about square.
    columns = min(max(1, round(sqrt(len(things) * (right - left) / (bottom - top)))), len(things))
    rows = ceil(len(things) / columns)
    width, height = (right - left) // columns, (bottom - top) // rows
    for index, thing in enumerate(things):
        x, y = left + index % columns * width, top + index // columns * height
        _draw_thing(draw, thing, (x + 2, y + 2, x + width - 2, y + height - 2))


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, box: Box) -> None:
    left, top, right, bottom = box
    if "on" in thing.states:
        draw.rectangle(box, fill=_LIT)
    frame = 0
    for state in thing.states:
        if state in _STATE_COLOURS:
            draw.rectangle(
                (left + frame, top + frame, right - frame, bottom - frame), outline=_STATE_COLOURS[state], width=6
            )
            frame += 6
    text = min(18, (bottom - top) // 4)
    size = min(right - left, bottom - top - text) - 2 * frame - 4
    middle = (left + right) // 2
    spot = (middle - size // 2, top + frame + 2, middle + size // 2, top + frame + 2 + size)
    _badge(draw, kind_of(thing.name), spot)
    if "sliced" in thing.states:
        draw.line((spot[0], spot[3], spot[2], spot[1]), fill="white", width=max(4, size // 6))
    _write(draw, thing.name, (left + frame, bottom - text - frame, right - frame, bottom - frame), text)


def _draw_room(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """Draw the middle of the room: the kinds of receptacles and how many of each."""
    _write(draw, f"middle of the {scene.room}", (6, 4, SIZE - 6, 40), 24)
    kinds = sorted({kind_of(name) for name in scene.all_places})
    counts = {kind: sum(kind_of(name) == kind for name in scene.all_places) for kind in kinds}
    _draw_grid(draw, tuple(Thing(f"{kind} x{counts[kind]}") for kind in kinds), (4, 42, SIZE - 4, 222))


def _draw_hand(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    box = (100, 230, 200, 298)
    draw.rectangle(box, fill=_INTERIOR, outline=_EDGE, width=2)
    _write(draw, "in hand", (8, 246, 94, 276), 20)
    _write(draw, scene.room, (206, 246, 294, 276), 20)
    if scene.held is not None:
        _draw_thing(draw, scene.held, (box[0] + 4, box[1] + 3, box[2] - 4, box[3] - 3))


def _badge(draw: ImageDraw.ImageDraw, kind: str, box: Box) -> None:
    index = _KINDS.index(kind) if kind in _KINDS else len(_KINDS)
    # Neighbours in the alphabet differ in colour and in shape.
    shape, colour = (
        _SHAPES[index % len(_SHAPES)],
        _COLOURS[(index % len(_SHAPES) + index // len(_SHAPES)) % len(_COLOURS)],
    )
    left, top, right, bottom = box
    size = right - left
    if size < 4:
        return
    if shape == "disc":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=max(3, size // 4))
    else:
        assert not isinstance(shape, str)
        x, y, radius = (left + right) / 2, (top + bottom) / 2, size / 2
        draw.polygon([(x + radius * across, y + radius * down) for across, down in shape], fill=colour)


def _write(draw: ImageDraw.ImageDraw, text: str, box: Box, size_px: int) -> None:
    """Draw text centred in a box, in the largest size up to `size_px` that fits; nothing if it would be unreadable."""
    left, top, right, bottom = box
    while size_px >= 7:
        font = bold_font(size_px)
        if font.getlength(text) <= right - left:
            across = left + (right - left - font.getlength(text)) / 2
            draw.text((round(across), round((top + bottom - size_px * 1.2) / 2)), text, font=font, fill="black")
            return
        size_px -= 1
