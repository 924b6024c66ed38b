"""What can be done to a phone, and how an action becomes labels and canonical text."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

from numpy.typing import NDArray

from envs.labels import LabelHead, LabelSpace

Point = tuple[float, float]
"""x and y as shares of the screen's width and height, each in [0, 1]; (0, 0) is the upper left corner."""

ActionType = Literal[
    "tap", "swipe", "type", "press_back", "press_home", "press_enter", "status_complete", "status_impossible"
]
ACTION_TYPES: tuple[ActionType, ...] = get_args(ActionType)

#: Touch and lift this close on screen, in pixels, are a tap (AitW's dual-point gestures).
TAP_PIXELS = 3.0
#: Cells the screen is divided into for the labels of a touch: columns and rows of about square cells.
CELL_COLUMNS, CELL_ROWS = 8, 14
#: Typed texts are labelled by a hash of so many values: equal texts agree, different ones mostly do not.
TEXT_BUCKETS = 64

LABEL_SPACE = LabelSpace(
    (
        LabelHead("type", len(ACTION_TYPES), ACTION_TYPES),
        LabelHead("touch_cell", CELL_COLUMNS * CELL_ROWS),
        LabelHead("lift_cell", CELL_COLUMNS * CELL_ROWS),
        LabelHead("text_bucket", TEXT_BUCKETS),
    )
)


@dataclass(frozen=True)
class PhoneAction:
    """One action; `touch` and `lift` belong to taps (where they are equal) and swipes, `text` to "type"."""

    type: ActionType
    touch: Point | None = None
    lift: Point | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        gesture = self.type in ("tap", "swipe")
        if gesture != (self.touch is not None) or gesture != (self.lift is not None):
            raise ValueError(f"touch and lift belong to taps and swipes, and to those only: {self}")
        if (self.type == "type") != (self.text is not None):
            raise ValueError(f"text belongs to the action 'type', and to that only: {self}")
        for point in (self.touch, self.lift):
            if point is not None and not all(0.0 <= value <= 1.0 for value in point):
                raise ValueError(f"a point lies on the screen, in [0, 1], not at {point}")


def tap(x: float, y: float) -> PhoneAction:
    """A tap at a share of the width and of the height."""
    return PhoneAction("tap", (x, y), (x, y))


def gesture(touch: Point, lift: Point, screen: tuple[int, int]) -> PhoneAction:
    """A dual-point gesture on a screen of (width, height) pixels: a tap where the two points nearly meet."""
    width, height = screen
    distance = math.hypot((lift[0] - touch[0]) * width, (lift[1] - touch[1]) * height)
    return tap(*touch) if distance <= TAP_PIXELS else PhoneAction("swipe", touch, lift)


def cell(point: Point) -> int:
    """The label of the screen cell a point lies in, row by row, 0..CELL_COLUMNS * CELL_ROWS - 1."""
    column = min(int(point[0] * CELL_COLUMNS), CELL_COLUMNS - 1)
    row = min(int(point[1] * CELL_ROWS), CELL_ROWS - 1)
    return row * CELL_COLUMNS + column


def text_bucket(text: str) -> int:
    """The label of a typed text: a hash that is the same in every process, 0..TEXT_BUCKETS - 1."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % TEXT_BUCKETS


def labels(action: PhoneAction) -> NDArray:
    """int32 (4,), one per head of `LABEL_SPACE`; -1 where a head does not apply."""
    values: dict[str, str | int] = {"type": action.type}
    if action.touch is not None and action.lift is not None:
        values |= {"touch_cell": cell(action.touch), "lift_cell": cell(action.lift)}
    if action.text is not None:
        values["text_bucket"] = text_bucket(action.text)
    return LABEL_SPACE.encode(values)
