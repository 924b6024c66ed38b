"""The actions on a phone, and their labels."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

from numpy.typing import NDArray

from envs.labels import LabelHead, LabelSpace

Point = tuple[float, float]
"""(x, y) as shares of the screen's width and height, each in [0, 1]; (0, 0) is the upper left corner."""

ActionType = Literal[
    "tap", "swipe", "type", "press_back", "press_home", "press_enter", "status_complete", "status_impossible"
]
ACTION_TYPES: tuple[ActionType, ...] = get_args(ActionType)

#: A gesture is a tap if touch and lift are this close, pixels (AitW's dual-point gestures).
TAP_PIXELS = 3.0
#: Columns and rows of about square screen cells, for the labels of touches.
CELL_COLUMNS, CELL_ROWS = 8, 14
#: Number of hash values that label typed texts; different texts rarely share a label.
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
    """One action. Taps (touch == lift) and swipes have `touch` and `lift`, "type" has `text`; else ValueError."""

    type: ActionType
    touch: Point | None = None
    lift: Point | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        gesture = self.type in ("tap", "swipe")
        if gesture != (self.touch is not None) or gesture != (self.lift is not None):
            raise ValueError(f"taps and swipes need touch and lift, other actions must not have them: {self}")
        if (self.type == "type") != (self.text is not None):
            raise ValueError(f"the action 'type' needs a text, other actions must not have one: {self}")
        for point in (self.touch, self.lift):
            if point is not None and not all(0.0 <= value <= 1.0 for value in point):
                raise ValueError(f"a point must have coordinates in [0, 1], not {point}")


def tap(x: float, y: float) -> PhoneAction:
    """A tap at a share of the width and of the height, each in [0, 1]."""
    return PhoneAction("tap", (x, y), (x, y))


def gesture(touch: Point, lift: Point, screen: tuple[int, int]) -> PhoneAction:
    """A dual-point gesture on a screen of (width, height) pixels: a tap if the two points are close together."""
    width, height = screen
    distance = math.hypot((lift[0] - touch[0]) * width, (lift[1] - touch[1]) * height)
    return tap(*touch) if distance <= TAP_PIXELS else PhoneAction("swipe", touch, lift)


def cell(point: Point) -> int:
    """The label of the screen cell that contains a point, row by row, 0..CELL_COLUMNS * CELL_ROWS - 1."""
    column = min(int(point[0] * CELL_COLUMNS), CELL_COLUMNS - 1)
    row = min(int(point[1] * CELL_ROWS), CELL_ROWS - 1)
    return row * CELL_COLUMNS + column


def text_bucket(text: str) -> int:
    """The label of a typed text: a hash in 0..TEXT_BUCKETS - 1, the same in every process."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % TEXT_BUCKETS


def labels(action: PhoneAction) -> NDArray:
    """int32 (4,), one per head of `LABEL_SPACE`; -1 where a head does not apply."""
    values: dict[str, str | int] = {"type": action.type}
    if action.touch is not None and action.lift is not None:
        values |= {"touch_cell": cell(action.touch), "lift_cell": cell(action.lift)}
    if action.text is not None:
        values["text_bucket"] = text_bucket(action.text)
    return LABEL_SPACE.encode(values)
