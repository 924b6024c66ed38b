"""The three text formats: any string is read without an exception, and what is written is read back."""

import json
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from envs.android.actions import (
    ACTION_TYPES,
    CELL_COLUMNS,
    CELL_ROWS,
    LABEL_SPACE,
    PhoneAction,
    cell,
    gesture,
    labels,
    tap,
    text_bucket,
)
from envs.android.formats import (
    PhoneParser,
    json_arguments,
    parse_autoui,
    read_shorthand,
    write_autoui,
    write_cogagent,
)

SCREEN = (360, 640)
PARSER = PhoneParser(SCREEN)
#: What formats are made of, so that strings nearly parse.
PIECES = st.sampled_from(
    [
        '"action_type": ', '"DUAL_POINT"', '"TYPE"', '"touch_point": ', '"lift_point": ', '"[0.5, 0.25]"', '"[9, -1]"',
        '"typed_text": "', "Action Decision: ", "Grounded Operation: ", "tap ", "[[500,250]]", "[[999999,1]]", "type ",
        "press ", "home", "swipe up", "{", "}", '{"action": "click", "coordinate": ', "[500, 250]", '"action"', "[",
        '{"name": "mobile_use", "arguments": ', '{"action": "type", "text": ', "NaN", "1e999", "<tool_call>", '"', ", ",
    ]
)  # fmt: skip

shares = st.integers(0, 10000).map(lambda value: value / 10000)
points = st.tuples(shares, shares)
actions = st.one_of(
    points.map(lambda at: tap(*at)),
    st.tuples(points, points).map(lambda both: gesture(*both, SCREEN)),
    st.text().map(lambda text: PhoneAction("type", text=text)),
    st.sampled_from([kind for kind in ACTION_TYPES if kind not in ("tap", "swipe", "type")]).map(PhoneAction),
)


@given(st.text() | st.lists(PIECES, max_size=12).map("".join))
@example('{"action": "click", "coordinate": [NaN, 1e999]}')
@example('{"action": "click", "coordinate": [' + "9" * 400 + ", 1]}")
@example('{"action": {"a": 1}, "button": []}')
@example("{" * 5000)
@example("[" * 100_000 + '{"action":')
@example('{"a":' * 20_000)
def test_any_string_is_read_without_an_exception(utterance: str) -> None:
    parsed = PARSER.parse(utterance)
    assert parsed.labels.dtype == np.int32 and parsed.labels.shape == (4,)
    assert parsed.valid == bool(parsed.action) == (parsed.labels[0] >= 0)


@pytest.mark.parametrize(
    "piece", ["{", '"action_type": ', "Grounded Operation: ", '{"a":', "[[1,2", '"touch_point": "[']
)
def test_long_strings_take_no_quadratic_time(piece: str) -> None:
    started = time.monotonic()
    PARSER.parse(piece * 40_000)
    assert time.monotonic() - started < 2


@given(actions)
@example(PhoneAction("type", text='a "quoted" word'))
@example(PhoneAction("type", text='{"action": "click", "coordinate": [1, 1]}'))
@example(PhoneAction("type", text="Grounded Operation: press home"))
def test_autoui_is_read_back(action: PhoneAction) -> None:
    assert parse_autoui(write_autoui(action), SCREEN) == action
    assert PARSER.action("Action Plan: [TYPE]; Action Decision: " + write_autoui(action)) == action


@given(actions)
def test_canonical_text_is_its_own_canonical_text(action: PhoneAction) -> None:
    parsed = PARSER.parse(write_autoui(action))
    assert parsed.valid and parsed.action == write_autoui(action)
    assert (parsed.labels == labels(action)).all()


@given(actions.filter(lambda action: action.type != "swipe"))
@example(PhoneAction("type", text='Grounded Operation: tap [[1,1]] "x" {'))
def test_cogagent_is_read_back(action: PhoneAction) -> None:
    found = PARSER.action("Plan: do it.\n" + write_cogagent(action))
    assert found is not None and found.type == action.type and found.text == action.text
    if action.touch and found.touch:
        assert np.allclose(found.touch, action.touch, atol=0.00051)


@given(actions)
@example(PhoneAction("type", text='Action Decision: "action_type": "PRESS_HOME"'))
def test_json_is_read_back(action: PhoneAction) -> None:
    call = {"name": "mobile_use", "arguments": json_arguments(action)}
    for utterance in (
        f"<tool_call>\n{json.dumps(call)}\n</tool_call>",
        json.dumps({"thoughts": "hm", **json_arguments(action)}, ensure_ascii=False),
    ):
        found = PARSER.action(utterance)
        assert found is not None and found.text == action.text
        if action.touch and action.lift and found.touch and found.lift:
            assert np.allclose((*found.touch, *found.lift), (*action.touch, *action.lift), atol=0.006)
        else:
            assert found.type == action.type


@pytest.mark.parametrize(
    ("utterance", "expected"),
    [
        (
            'Action Decision: "action_type": "DUAL_POINT", "touch_point": "[0.7761, 0.7089]", '
            '"lift_point": "[0.7761, 0.7089]", "typed_text": ""',
            tap(0.7089, 0.7761),
        ),
        (
            'Action Decision: "action_type": "DUAL_POINT", "touch_point": "[0.8, 0.5]", '
            '"lift_point": "[0.2, 0.5]", "typed_text": ""',
            PhoneAction("swipe", (0.5, 0.8), (0.5, 0.2)),
        ),
        ('"action_type": "STATUS_TASK_COMPLETE"', PhoneAction("status_complete")),
        ('Grounded Operation: tap the "Search" button [[450,120]]', tap(0.45, 0.12)),
        ('Grounded Operation: type "best rated mug" in the field', PhoneAction("type", text="best rated mug")),
        ("Grounded operation:press the home button", PhoneAction("press_home")),
        ("Grounded Operation: swipe left", PhoneAction("swipe", (0.8, 0.5), (0.2, 0.5))),
        ('{"action": "system_button", "button": "Back"}', PhoneAction("press_back")),
        ('{"action": "terminate", "status": "failure"}', PhoneAction("status_impossible")),
        (
            'I will tap. {"name": "mobile_use", "arguments": {"action": "click", "coordinate": [500, 1000]}}',
            tap(0.5, 1.0),
        ),
        (
            '{"thoughts": "{not this}", "action": "type", "text": "line\nbreak"}',
            PhoneAction("type", text="line\nbreak"),
        ),
    ],
)
def test_published_examples(utterance: str, expected: PhoneAction) -> None:
    assert PARSER.action(utterance) == expected


@pytest.mark.parametrize(
    "utterance",
    [
        "",
        "tap the button",
        '{"action": "click", "coordinate": [500, 1001]}',
        '{"action": "click", "coordinate": [true, 1]}',
        '{"action": "dance"}',
        '"action_type": "DUAL_POINT", "touch_point": "[0.5, 0.5]"',
        '"action_type": "DUAL_POINT", "touch_point": "[1.5, 0.5]", "lift_point": "[0.5, 0.5]"',
        "Grounded Operation: tap somewhere",
        "Grounded Operation: press the volume key",
    ],
)
def test_what_is_no_action_is_idle(utterance: str) -> None:
    assert not PARSER.parse(utterance).valid


def test_pixels_are_a_unit_too() -> None:
    action = PhoneParser(SCREEN, "pixels").action('{"action": "click", "coordinate": [180, 160]}')
    assert action == tap(0.5, 0.25)


@pytest.mark.parametrize(("lift", "kind"), [((0.5, 0.5 + 3 / 640), "tap"), ((0.5, 0.5 + 4 / 640), "swipe")])
def test_a_tap_is_a_gesture_that_nearly_ends_where_it_began(lift: tuple[float, float], kind: str) -> None:
    assert gesture((0.5, 0.5), lift, SCREEN).type == kind


@given(points)
def test_cells_tile_the_screen(point: tuple[float, float]) -> None:
    column, row = point[0] * CELL_COLUMNS, point[1] * CELL_ROWS
    number = cell(point)
    assert 0 <= number < LABEL_SPACE.sizes[1]
    assert 0 <= column - number % CELL_COLUMNS <= 1 and 0 <= row - number // CELL_COLUMNS <= 1


def test_labels_tell_actions_apart() -> None:
    assert labels(tap(0.1, 0.1))[1:].tolist() == [cell((0.1, 0.1))] * 2 + [-1]
    assert labels(PhoneAction("type", text="a"))[1:].tolist() == [-1, -1, text_bucket("a")]
    assert labels(PhoneAction("press_home"))[1:].tolist() == [-1, -1, -1]
    assert text_bucket("\ud800") >= 0  # a lone surrogate, as a model's bytes can decode to


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tap 500 250", tap(0.5, 0.25)),
        (" SWIPE 500 800 500 200 ", PhoneAction("swipe", (0.5, 0.8), (0.5, 0.2))),
        ("swipe up", PhoneAction("swipe", (0.5, 0.8), (0.5, 0.2))),
        ("type  two words ", PhoneAction("type", text=" two words ")),
        ("home", PhoneAction("press_home")),
        ("done", PhoneAction("status_complete")),
        ("tap 500", None),
        ("tap a b", None),
        ("tap 500 2000", None),
        ("type", None),
        ("swipe nowhere", None),
        ("", None),
    ],
)
def test_what_a_person_types(line: str, expected: PhoneAction | None) -> None:
    assert read_shorthand(line, SCREEN) == expected


@given(st.text())
def test_any_line_is_read_without_an_exception(line: str) -> None:
    read_shorthand(line, SCREEN)
    read_shorthand("tap " + line, SCREEN)
