"""Which command an utterance names, as published but for numbers cut short, and what its labels are."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.alfworld.commands import COMMAND_LABELS, command_labels, find_admissible, find_any, parsed, unparsed
from envs.alfworld.names import OBJECTS, RECEPTACLES

ADMISSIBLE = (
    "close drawer 1",
    "examine drawer 1",
    "go to shelf 1",
    "go to shelf 10",
    "go to shelf 2",
    "help",
    "inventory",
    "look",
    "move mug 1 to drawer 1",
)

numbers = st.integers(1, 30)
things = st.builds("{} {}".format, st.sampled_from(OBJECTS), numbers)
places = st.builds("{} {}".format, st.sampled_from(RECEPTACLES), numbers)
commands = st.one_of(
    st.sampled_from(["look", "inventory", "help"]),
    st.builds("{} {}".format, st.sampled_from(["go to", "open", "close", "examine"]), places),
    st.builds("{} {}".format, st.sampled_from(["use", "examine"]), things),
    st.builds("take {} from {}".format, things, places),
    st.builds("move {} to {}".format, things, places),
    st.builds("put {} in/on {}".format, things, places),
    st.builds("{} {} with {}".format, st.sampled_from(["heat", "cool", "clean"]), things, places),
    st.builds("slice {} with {}".format, things, things),
)


def published_search(utterance: str, admissible: tuple[str, ...]) -> str:
    """The published loop, for utterances with at most one `"action":`."""
    lowered = utterance.lower()
    start = lowered.find('"action":')
    part = lowered[start:] if start >= 0 else lowered[-30:]
    return next((command for command in admissible if command in part), "")


@pytest.mark.parametrize(
    ("utterance", "command"),
    [
        ('{"thoughts": "go to shelf 2?", "action": "close drawer 1"}', "close drawer 1"),
        ('"action": "Go To Shelf 2"', "go to shelf 2"),
        ('"action": "go to shelf 10"', "go to shelf 10"),  # the published search says shelf 1
        ('"action": "go to shelf 12"', ""),  # and here too
        ('"action": "go to shelf 1", or shelf 10', "go to shelf 1"),
        ('"action": "look, then close drawer 1"', "close drawer 1"),  # the first of the list, not of the text
        ('"action": "fly"', ""),
        ('"action": "look"} no: "action": "help"', "help"),
        ("I think I will go to shelf 2", "go to shelf 2"),
        ("go to shelf 2 is what I will do, as it is nearer", ""),  # not in the last 30 characters
        ("", ""),
    ],
)
def test_the_command_an_utterance_names(utterance: str, command: str) -> None:
    assert find_admissible(utterance, ADMISSIBLE) == command


@given(st.text())
def test_any_text_names_an_admissible_command_or_none(utterance: str) -> None:
    for text in (utterance, f'"action": {utterance}'):
        assert find_admissible(text, ADMISSIBLE) in (*ADMISSIBLE, "")


@given(st.lists(st.sampled_from([*ADMISSIBLE, "go to shelf 12", ", ", "then ", "x"]), max_size=4), st.booleans())
def test_it_is_the_published_search_where_numbers_are_not_cut_short(parts: list[str], marked: bool) -> None:
    utterance = ('"action": ' if marked else "") + " ".join(parts)
    if re.search(r"shelf 1\d", utterance):
        return
    assert find_admissible(utterance, ADMISSIBLE) == published_search(utterance, ADMISSIBLE)


@given(commands)
def test_every_command_is_found_whole_and_has_labels(command: str) -> None:
    assert find_any(f'{{"thoughts": "look", "action": "{command}"}}') == command
    action = parsed(command)
    assert action.valid and action.action == command and action.labels.dtype == np.int32
    assert action.labels[0] >= 0 and (action.labels < COMMAND_LABELS.sizes).all()
    words = [word for word in command.split() if word.isdigit()]
    assert sum(label >= 0 for label in action.labels) == 1 + 2 * len(words)


@given(commands, commands)
def test_different_commands_have_different_labels(one: str, other: str) -> None:
    older = {one.replace("put", "move").replace("in/on", "to"), other.replace("put", "move").replace("in/on", "to")}
    assert (parsed(one).labels.tolist() == parsed(other).labels.tolist()) is (len(older) == 1)


def test_the_labels_of_a_command() -> None:
    assert command_labels("move mug 2 to desk 1") == {
        "verb": "move",
        "object": "mug",
        "object_number": 1,
        "receptacle": "desk",
        "receptacle_number": 0,
    }
    assert command_labels("go to desk 99")["receptacle_number"] == 31  # all above 32 are one
    assert command_labels("take gadget 1 from desk 1")["object"] == "other"
    assert unparsed().labels.tolist() == [-1] * 5 and not unparsed().valid
    with pytest.raises(ValueError, match="not an ALFWorld command"):
        command_labels("fly")
