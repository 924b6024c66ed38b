"""The keyword parser: one distinct word after the last marker, for any string, in linear time."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.labels import LabelHead, LabelSpace
from envs.parsing import ACTION_MARKER, KeywordParser, action_part_start

NUMBER_LINE = KeywordParser(("-", "+"))
DIGITS = tuple(str(n) for n in range(1, 11))
POINTS = KeywordParser((*DIGITS, "+", "*", "="))
CARDS = KeywordParser(("stand", "hit"))

any_text = st.text(st.characters())  # surrogates and all
near_answers = st.lists(
    st.one_of(any_text, st.sampled_from(['"action":', '"ACTION":', ' "', "+", "-", "10", "1", "0", "hit", "Stand"]))
).map("".join)


@pytest.mark.parametrize(
    ("parser", "utterance", "action"),
    [
        (NUMBER_LINE, '{"thoughts": "3 - 5 is less", "action": "+"}', "+"),
        (NUMBER_LINE, '{"thoughts": "so", "action": "-"}', "-"),
        (NUMBER_LINE, '{"action": "+"} {"action": "-"}', "-"),
        (NUMBER_LINE, '"action":+++', "+"),
        (NUMBER_LINE, '"ACTION": "+"', "+"),
        (NUMBER_LINE, '"action": "+ or -"', ""),
        (NUMBER_LINE, '"action": "add"', ""),
        (NUMBER_LINE, '"action" : "+"', ""),
        (NUMBER_LINE, "+", ""),
        (NUMBER_LINE, "", ""),
        (NUMBER_LINE, '"action": "+"}\n{"action":', ""),
        (CARDS, '"action": "STAND"', "stand"),
        (CARDS, '"action": "hit", or stand?', ""),
        (POINTS, '"action": "10"', "10"),
        (POINTS, '"action": "1"', "1"),
        (POINTS, '"action": "1010"', "10"),
        (POINTS, '"action": "101"', ""),
        (POINTS, '"action": "110"', ""),
        (POINTS, '"action": "1100"', ""),
        (POINTS, '"action": "0"', ""),
    ],
)
def test_the_word_after_the_last_marker_is_the_action(parser: KeywordParser, utterance: str, action: str) -> None:
    parsed = parser.parse(utterance)
    assert parsed.action == action
    assert parsed.valid == bool(action)
    assert parsed.labels.dtype == np.int32
    assert parsed.labels.tolist() == [parser.words.index(action) if action else -1]


def words_by_hand(words: tuple[str, ...], utterance: str) -> set[str]:
    """The rule said another way: take the longest words out of the pieces that earlier words have left."""
    lowered = "".join(c.lower() if c.isascii() else c for c in utterance)
    if '"action":' not in lowered:
        return set()
    pieces = [lowered.split('"action":')[-1]]
    found = set()
    for word in sorted(words, key=len, reverse=True):
        if any(word in piece for piece in pieces):
            found.add(word)
        pieces = [part for piece in pieces for part in piece.split(word)]
    return found


@given(near_answers, st.sampled_from([NUMBER_LINE, POINTS, CARDS]))
def test_any_string_has_a_defined_outcome(utterance: str, parser: KeywordParser) -> None:
    found = words_by_hand(parser.words, utterance)
    parsed = parser.parse(utterance)
    assert parsed.valid == (len(found) == 1)
    assert parsed.action == (found.pop() if parsed.valid else "")


@given(near_answers)
def test_the_action_part_starts_at_an_offset_of_the_utterance_itself(utterance: str) -> None:
    start = action_part_start(utterance)
    if start >= 0:
        assert utterance[start : start + len(ACTION_MARKER)].lower() == ACTION_MARKER
        assert action_part_start(utterance[start + 1 :]) == -1
    else:
        assert ACTION_MARKER not in utterance


def test_characters_that_grow_in_lower_case_do_not_shift_the_action_part() -> None:
    utterance = 'İİİ "Action": +'
    assert utterance[action_part_start(utterance) :] == '"Action": +'


def test_time_grows_with_the_length_and_not_its_square() -> None:
    started = time.perf_counter()
    for hostile in ('"action":' * 500_000, '"action":' + "10" * 2_000_000, '"' * 4_000_000):
        POINTS.parse(hostile)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("words", [(), ("+", "+"), ("",), ("Hit",)])
def test_words_that_could_never_be_told_apart_or_found_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="action word"):
        KeywordParser(words)


def test_label_space_encodes_by_name_and_refuses_what_it_does_not_have() -> None:
    space = LabelSpace((LabelHead("type", 2, ("tap", "text")), LabelHead("cell", 9)))
    assert space.sizes == (2, 9)
    assert space.encode({"type": "text"}).tolist() == [1, -1]
    assert space.encode({"type": "tap", "cell": 8}).tolist() == [0, 8]
    assert space.none().tolist() == [-1, -1]
    for values, words in (
        ({"typ": "tap"}, "no label head"),
        ({"type": "x"}, "no value"),
        ({"cell": 9}, "0..8"),
    ):
        with pytest.raises(ValueError, match=words):
            space.encode(values)
    with pytest.raises(ValueError, match="distinct"):
        LabelSpace((LabelHead("type", 2), LabelHead("type", 3)))
    with pytest.raises(ValueError, match="2 values but 1 names"):
        LabelHead("type", 2, ("tap",))
