"""The text formats of phone actions: Auto-UI's, CogAgent's, and JSON tool calls (Qwen mobile-use).

A parser takes any string, returns an action or None, never raises, and takes time linear in the string. Typed text may
contain any character, also quotes: it ends at the last quote of the utterance (in JSON, at the string's end).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, Literal

from envs.android.actions import LABEL_SPACE, ActionType, PhoneAction, Point, gesture, labels, tap
from envs.labels import ParsedAction
from envs.parsing import without_surrogates

AnswerFormat = Literal["json", "autoui", "cogagent"]
JsonCoordinates = Literal["thousandths", "pixels"]
Screen = tuple[int, int]

_NUMBER = r"(-?\d{1,6}(?:\.\d{0,12})?)"
_AUTOUI_TYPE = re.compile(r'"?action_type"?\s{0,8}:\s{0,8}"?([A-Za-z_]{1,32})')
_AUTOUI_TEXT = re.compile(r'"?typed_text"?\s{0,8}:\s{0,8}"')
_AUTOUI_POINTS = {
    name: re.compile(rf'"?{name}"?\s{{0,8}}:\s{{0,8}}"?\[\s{{0,8}}{_NUMBER}\s{{0,8}},\s{{0,8}}{_NUMBER}\s{{0,8}}\]')
    for name in ("touch_point", "lift_point")
}
_AUTOUI_NAMES: dict[str, ActionType] = {
    "PRESS_BACK": "press_back",
    "PRESS_HOME": "press_home",
    "PRESS_ENTER": "press_enter",
    "STATUS_TASK_COMPLETE": "status_complete",
    "STATUS_TASK_IMPOSSIBLE": "status_impossible",
    "STATUS_COMPLETE": "status_complete",
    "STATUS_IMPOSSIBLE": "status_impossible",
}
_COGAGENT_MARKER = re.compile(r"Grounded\s{1,8}Operation\s{0,8}:", re.IGNORECASE)
_COGAGENT_VERB = re.compile(r"\b(tap|click|type|input|press|swipe|scroll|complete|impossible)\b", re.IGNORECASE)
_COGAGENT_POINT = re.compile(rf"\[\[\s{{0,8}}{_NUMBER}\s{{0,8}},\s{{0,8}}{_NUMBER}\s{{0,8}}\]\]")
_COGAGENT_KEY = re.compile(r"\b(back|home|enter)\b", re.IGNORECASE)
_DIRECTION = re.compile(r"\b(up|down|left|right)\b", re.IGNORECASE)
#: Direction of the finger -> touch and lift of the swipe.
SWIPES: dict[str, tuple[Point, Point]] = {
    "up": ((0.5, 0.8), (0.5, 0.2)),
    "down": ((0.5, 0.2), (0.5, 0.8)),
    "left": ((0.8, 0.5), (0.2, 0.5)),
    "right": ((0.2, 0.5), (0.8, 0.5)),
}
_BUTTONS: dict[str, ActionType] = {"back": "press_back", "home": "press_home", "enter": "press_enter"}
_STATUSES: dict[str, ActionType] = {"success": "status_complete", "failure": "status_impossible"}
#: Most opening braces that are tried as the start of a JSON object, so that many braces do not take quadratic time.
_JSON_ATTEMPTS = 16
_JSON_ACTION = re.compile(r'"action"\s{0,8}:')
_JSON = json.JSONDecoder(strict=False)


class PhoneParser:
    """Reads an utterance in any of the three formats: the format that starts first and parses."""

    def __init__(self, screen: Screen, json_coordinates: JsonCoordinates = "thousandths") -> None:
        """screen: (width, height) in pixels; json_coordinates: the unit of points in JSON answers."""
        self._screen = screen
        self._json_scale = screen if json_coordinates == "pixels" else (1000, 1000)

    def action(self, utterance: str) -> PhoneAction | None:
        """The action in an utterance, or None."""
        return self._find(utterance)[0]

    def _find(self, utterance: str) -> tuple[PhoneAction | None, int | None]:
        """The action in an utterance and the character where it begins, or (None, None)."""
        found: list[tuple[int, Callable[[str], PhoneAction | None]]] = []
        if (autoui := _AUTOUI_TYPE.search(utterance)) is not None:
            found.append((autoui.start(), lambda text: parse_autoui(text, self._screen)))
        if (cogagent := _COGAGENT_MARKER.search(utterance)) is not None:
            found.append((cogagent.start(), parse_cogagent))
        if (brace := utterance.find("{")) >= 0:
            found.append((brace, lambda text: parse_json(text, self._screen, self._json_scale)))
        for start, parse in sorted(found, key=lambda item: item[0]):
            if (action := parse(utterance)) is not None:
                return action, _json_start(utterance, start) if utterance[start] == "{" else start
        return None, None

    def parse(self, utterance: str) -> ParsedAction:
        """The action as canonical text and labels; an utterance without an action is invalid."""
        action, start = self._find(utterance)
        if action is None:
            return ParsedAction("", LABEL_SPACE.none(), False)
        return ParsedAction(write_autoui(action), labels(action), True, start)


def _json_start(utterance: str, brace: int) -> int:
    """Where the action begins in a JSON answer: at the last `"action"` key, since thoughts may stand before it."""
    return max((key.start() for key in _JSON_ACTION.finditer(utterance, brace)), default=brace)


def parse_autoui(utterance: str, screen: Screen) -> PhoneAction | None:
    """`"action_type": "DUAL_POINT", "touch_point": "[y, x]", "lift_point": "[y, x]", "typed_text": ""`."""
    kind = _AUTOUI_TYPE.search(utterance)
    if kind is None:
        return None
    name = kind.group(1).upper()
    if name in _AUTOUI_NAMES:
        return PhoneAction(_AUTOUI_NAMES[name])
    if name == "TYPE":
        opening = _AUTOUI_TEXT.search(utterance, kind.end())
        if opening is None:
            return None
        closing = utterance.rfind('"')
        # A truncated answer has no closing quote.
        text = utterance[opening.end() : closing] if closing >= opening.end() else utterance[opening.end() :]
        return PhoneAction("type", text=text)
    if name != "DUAL_POINT":
        return None
    touch, lift = (pattern.search(utterance, kind.end()) for pattern in _AUTOUI_POINTS.values())
    if touch is None or lift is None:
        return None
    return _gesture(
        (float(touch.group(2)), float(touch.group(1))), (float(lift.group(2)), float(lift.group(1))), screen
    )


def parse_cogagent(utterance: str) -> PhoneAction | None:
    """`Grounded Operation: tap the … [[x,y]]` in thousandths; type "…"; press back, home or enter; swipe up, …."""
    marker = _COGAGENT_MARKER.search(utterance)
    verb = _COGAGENT_VERB.search(utterance, marker.end()) if marker else None
    if verb is None:
        return None
    word = verb.group(1).lower()
    if word in ("complete", "impossible"):
        return PhoneAction("status_complete" if word == "complete" else "status_impossible")
    if word in ("type", "input"):
        opening, closing = utterance.find('"', verb.end()), utterance.rfind('"')
        return PhoneAction("type", text=utterance[opening + 1 : closing]) if 0 <= opening < closing else None
    if word == "press":
        key = _COGAGENT_KEY.search(utterance, verb.end())
        return PhoneAction(_BUTTONS[key.group(1).lower()]) if key else None
    place = _COGAGENT_POINT.search(utterance, verb.end())
    point = (float(place.group(1)) / 1000, float(place.group(2)) / 1000) if place else None
    if word in ("tap", "click"):
        return tap(*point) if point and _on_screen(point) else None
    direction = _DIRECTION.search(utterance, verb.end())
    return PhoneAction("swipe", *SWIPES[direction.group(1).lower()]) if direction else None


def parse_json(utterance: str, screen: Screen, scale: tuple[int, int] = (1000, 1000)) -> PhoneAction | None:
    """`{"name": "mobile_use", "arguments": {"action": "click", "coordinate": [x, y]}}`, or the arguments alone.

    Other text may surround the object, as in `<tool_call>…</tool_call>`. scale: the largest x and y.
    """
    position = -1
    for _ in range(_JSON_ATTEMPTS):
        position = utterance.find("{", position + 1)
        if position < 0:
            return None
        try:
            value, _ = _JSON.raw_decode(utterance, position)
        except (ValueError, RecursionError):
            continue
        arguments = value.get("arguments", value) if isinstance(value, dict) else None
        if isinstance(arguments, dict) and (action := _from_arguments(arguments, screen, scale)) is not None:
            return action
    return None


def _from_arguments(arguments: dict[str, Any], screen: Screen, scale: tuple[int, int]) -> PhoneAction | None:
    name = arguments.get("action")
    if name in ("click", "tap", "long_press"):
        point = _json_point(arguments.get("coordinate"), scale)
        return tap(*point) if point else None
    if name == "swipe":
        touch, lift = (_json_point(arguments.get(key), scale) for key in ("coordinate", "coordinate2"))
        return _gesture(touch, lift, screen) if touch and lift else None
    if name == "type":
        text = arguments.get("text")
        # JSON can spell half a character, which no device takes.
        return PhoneAction("type", text=without_surrogates(text)) if isinstance(text, str) else None
    if name == "system_button":
        button = arguments.get("button")
        return PhoneAction(_BUTTONS[button.lower()]) if isinstance(button, str) and button.lower() in _BUTTONS else None
    if name == "terminate":
        status = arguments.get("status", "success")
        return PhoneAction(_STATUSES[status]) if isinstance(status, str) and status in _STATUSES else None
    return None


def _json_point(value: Any, scale: tuple[int, int]) -> Point | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in value):
        return None
    try:
        point = (float(value[0]) / scale[0], float(value[1]) / scale[1])
    except OverflowError:
        return None
    return point if _on_screen(point) else None


def _on_screen(point: Point) -> bool:
    return all(math.isfinite(value) and 0.0 <= value <= 1.0 for value in point)


def _gesture(touch: Point, lift: Point, screen: Screen) -> PhoneAction | None:
    return gesture(touch, lift, screen) if _on_screen(touch) and _on_screen(lift) else None


def write_autoui(action: PhoneAction) -> str:
    """Write an action in Auto-UI's format, which is also the canonical text; points are rounded to 1e-4."""
    names = {value: key for key, value in reversed(_AUTOUI_NAMES.items())}
    if action.type in ("tap", "swipe"):
        assert action.touch is not None and action.lift is not None
        kind, points = "DUAL_POINT", [f"[{y:.4f}, {x:.4f}]" for x, y in (action.touch, action.lift)]
    else:
        kind, points = ("TYPE" if action.type == "type" else names[action.type]), ["[-1.0, -1.0]"] * 2
    return (
        f'"action_type": "{kind}", "touch_point": "{points[0]}", "lift_point": "{points[1]}", '
        f'"typed_text": "{action.text or ""}"'
    )


def write_cogagent(action: PhoneAction) -> str:
    """Write an action as `Grounded Operation: …`; a swipe becomes its main direction."""
    if action.type == "tap":
        assert action.touch is not None
        words = f"tap [[{round(action.touch[0] * 1000):03d},{round(action.touch[1] * 1000):03d}]]"
    elif action.type == "swipe":
        assert action.touch is not None and action.lift is not None
        dx, dy = action.lift[0] - action.touch[0], action.lift[1] - action.touch[1]
        words = "swipe " + (("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up"))
    elif action.type == "type":
        words = f'type "{action.text}"'
    else:
        words = action.type.replace("press_", "press ").replace("status_", "task ")
    return f"Grounded Operation: {words}"


def json_arguments(action: PhoneAction, scale: tuple[int, int] = (1000, 1000)) -> dict[str, Any]:
    """An action as the arguments of a `mobile_use` tool call, with points rounded to whole units of `scale`."""

    def units(point: Point | None) -> list[int]:
        assert point is not None
        return [round(point[0] * scale[0]), round(point[1] * scale[1])]

    if action.type == "tap":
        return {"action": "click", "coordinate": units(action.touch)}
    if action.type == "swipe":
        return {"action": "swipe", "coordinate": units(action.touch), "coordinate2": units(action.lift)}
    if action.type == "type":
        return {"action": "type", "text": action.text}
    if action.type.startswith("press_"):
        return {"action": "system_button", "button": action.type.removeprefix("press_").capitalize()}
    return {"action": "terminate", "status": "success" if action.type == "status_complete" else "failure"}


def read_shorthand(line: str, screen: Screen) -> PhoneAction | None:
    """Read an action that a person typed: `tap X Y`, `swipe X Y X Y` (in thousandths), `swipe up`, `type TEXT`, a key's
    name, `done`, `impossible`; None for anything else."""
    verb, _, rest = line.strip("\r\n").lstrip().partition(" ")
    words = rest.split()
    match verb.lower(), words:
        case "type", [_, *_]:
            return PhoneAction("type", text=rest)
        case "swipe", [direction] if direction in SWIPES:
            return PhoneAction("swipe", *SWIPES[direction])
        case ("back" | "home" | "enter") as button, []:
            return PhoneAction(_BUTTONS[button])
        case "done", []:
            return PhoneAction("status_complete")
        case "impossible", []:
            return PhoneAction("status_impossible")
        case ("tap", [_, _]) | ("swipe", [_, _, _, _]):
            if not all(re.fullmatch(_NUMBER, word) for word in words):
                return None
            shares = [float(word) / 1000 for word in words]
            return _gesture((shares[0], shares[1]), (shares[-2], shares[-1]), screen)
    return None
