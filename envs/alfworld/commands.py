"""ALFWorld's commands: labels for the structural causal model, and the parser that finds a command in an utterance."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from envs.alfworld.names import OBJECTS, RECEPTACLES, VERBS
from envs.labels import LabelHead, LabelSpace, ParsedAction
from envs.parsing import ACTION_MARKER, action_part_start

#: Number of last characters searched in an answer without `"action":` (published).
TAIL_CHARACTERS = 30
#: Largest label of an object number; larger numbers share it (the largest in the shipped floor plans is 28).
LARGEST_NUMBER = 32

_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_GAP = "\0"
_KINDS = (*OBJECTS, *RECEPTACLES, "other")
_NUMBERS = tuple(str(number) for number in range(1, LARGEST_NUMBER + 1))

COMMAND_LABELS = LabelSpace(
    (
        LabelHead("verb", len(VERBS), VERBS),
        LabelHead("object", len(_KINDS), _KINDS),
        LabelHead("object_number", len(_NUMBERS), _NUMBERS),
        LabelHead("receptacle", len(_KINDS), _KINDS),
        LabelHead("receptacle_number", len(_NUMBERS), _NUMBERS),
    )
)
"""Heads for verb, object and receptacle. Kind and number are separate heads, so that "cabinet 7" and "cabinet 8" share
one. The tool of an action (microwave, fridge, sink, knife) is labelled as the receptacle."""

_THING = r"([a-z]+ \d+)"
# Games of ALFWorld 0.3 say `put ... in/on` for `move ... to`.
_COMMAND = re.compile(
    rf"(?:(?:go to|open|close) (?P<place>[a-z]+ \d+)"
    rf"|take {_THING} from {_THING}"
    rf"|move {_THING} to {_THING}"
    rf"|put {_THING} in/on {_THING}"
    rf"|(?:heat|cool|clean|slice) {_THING} with {_THING}"
    rf"|(?:use|examine) (?P<thing>[a-z]+ \d+)"
    rf"|look|inventory|help)(?!\d)"
)


def command_labels(command: str) -> dict[str, str | int]:
    """The labels of a command, for `LabelSpace.encode`. Raises ValueError if it is not a command."""
    found = _COMMAND.fullmatch(command)
    if found is None:
        raise ValueError(f"{command!r} is not an ALFWorld command")
    verb = command.split(" ", 1)[0].replace("put", "move")
    things = [group for group in found.groups() if group]
    labels: dict[str, str | int] = {"verb": verb}
    is_place = len(things) == 1 and (found["place"] is not None or things[0].split()[0] in RECEPTACLES)
    heads = ("receptacle",) if is_place else ("object", "receptacle")
    for head, thing in zip(heads, things, strict=False):
        kind, number = thing.split()
        labels[head] = kind if kind in _KINDS else "other"
        labels[f"{head}_number"] = min(max(int(number), 1), LARGEST_NUMBER) - 1
    return labels


def parsed(command: str, start: int | None = None) -> ParsedAction:
    """A valid parsed action from a command; start: see `ParsedAction`."""
    return ParsedAction(command, COMMAND_LABELS.encode(command_labels(command)), True, start)


def unparsed(start: int | None = None) -> ParsedAction:
    """The parsed action of an utterance that names no command; start: see `ParsedAction`."""
    return ParsedAction("", COMMAND_LABELS.none(), False, start)


def find_admissible(utterance: str, admissible: Sequence[str]) -> str:
    """The command that an utterance names, or "": the published search with one correction.

    The search covers the text after the last `"action":`, or else the last 30 characters, in lower case. It returns
    the first command of `admissible` that occurs there. Correction: a command that occurs only inside a longer one
    ("go to shelf 1" in "go to shelf 12") does not count. In the published search, the longer one can never be chosen.
    """
    tail = _searched_part(utterance)
    found = set()
    for command in sorted(admissible, key=len, reverse=True):
        if command in tail:
            without = re.sub(rf"{re.escape(command)}(?!\d)", _GAP, tail)
            if without != tail:
                found.add(command)
                tail = without
    return next((command for command in admissible if command in found), "")


class AnyCommandParser:
    """Reads a command from an utterance without the list of admissible commands."""

    def parse(self, utterance: str) -> ParsedAction:
        """The first well-formed command of the part that `find_admissible` searches."""
        command = find_any(utterance)
        start = searched_from(utterance)
        return parsed(command, start) if command else unparsed(start)


def find_any(utterance: str) -> str:
    """The first well-formed command in the part of an utterance that `find_admissible` searches, or ""."""
    found = _COMMAND.search(_searched_part(utterance))
    return found[0] if found else ""


def _searched_part(utterance: str) -> str:
    start = action_part_start(utterance)
    tail = utterance[start + len(ACTION_MARKER) :] if start >= 0 else utterance[-TAIL_CHARACTERS:]
    return tail.translate(_ASCII_LOWER)


def searched_from(utterance: str) -> int:
    """Where the part of an utterance begins that `find_admissible` searches, its `"action":` included."""
    start = action_part_start(utterance)
    return start if start >= 0 else max(0, len(utterance) - TAIL_CHARACTERS)
