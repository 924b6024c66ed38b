"""What an environment returns: converted where nothing is lost, refused with its name and field where it is wrong."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from actors.images import image_hash
from envs.labels import LabelHead, LabelSpace
from envs.output import EnvironmentOutput, EnvironmentOutputError

IMAGE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = IMAGE[:, :, 0]
UTTERANCE = '{"action": "+"}'
INFO = {"action": "+", "action_labels": np.array([1, -1], np.int32), "valid": True, "success": False, "extra": {1: 2}}
output = EnvironmentOutput("mine/Game-v0", LabelSpace((LabelHead("kind", 3), LabelHead("place", 2))))


def stepped(**changes: Any) -> tuple[Any, ...]:
    """A step's result with some fields changed, checked."""
    fields: dict[str, Any] = {"image": IMAGE, "prompt": "Go.", "reward": 1.0, "terminated": False, "truncated": False}
    fields |= INFO | changes
    info = {name: value for name, value in fields.items() if name in {*INFO, "action_start"} and value is not ...}
    observation = {name: fields[name] for name in ("image", "prompt") if fields[name] is not ...}
    return output.step((observation, fields["reward"], fields["terminated"], fields["truncated"], info), UTTERANCE)


def rgb(image: np.ndarray) -> np.ndarray:
    return np.stack([image] * 3, axis=2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (IMAGE, IMAGE),
        (IMAGE[:, ::-1], IMAGE[:, ::-1].copy()),
        (GREY, rgb(GREY)),
        (GREY[:, :, None], rgb(GREY)),
        (np.dstack([IMAGE, np.full((5, 7), 255, np.uint8)]), IMAGE),
        (IMAGE.astype(np.int64), IMAGE),
        (IMAGE.astype(np.float32), IMAGE),
        (GREY.astype(np.float64), rgb(GREY)),
        (np.zeros((5, 7, 3), np.float32), np.zeros((5, 7, 3), np.uint8)),
    ],
)
def test_images_that_say_the_same_are_converted(given: np.ndarray, expected: np.ndarray) -> None:
    for observation in (stepped(image=given)[0], output.reset(({"image": given, "prompt": ""}, {}))[0]):
        image = observation["image"]
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        assert np.array_equal(image, expected) and image_hash(image) == image_hash(expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (IMAGE / np.float32(255), r"an array of float32 \(5, 7, 3\) from 0\.\d+ to 0\.\d+"),
        (np.round(IMAGE / np.float32(255)), "float32"),  # black and white, or nearly black?
        (IMAGE + np.float32(0.5), "float32"),
        (IMAGE.astype(np.float32) * np.nan, "float32"),
        (IMAGE.astype(np.int64) - 1, "from -1 to"),
        (IMAGE.astype(np.int64) + 256, "int64"),
        (IMAGE > 3, "an array of bool"),
        (IMAGE.transpose(2, 0, 1), r"\(3, 5, 7\)"),
        (IMAGE[None], r"\(1, 5, 7, 3\)"),
        (IMAGE[:0], r"\(0, 7, 3\)"),
        (np.dstack([IMAGE, GREY]), r"\(5, 7, 4\)"),
        (None, r"None \(NoneType\)"),
        (IMAGE.tolist(), r"… \(list\)"),
    ],
)
def test_images_that_would_change_are_refused(given: Any, words: str) -> None:
    expected = rf"^mine/Game-v0: %s returned observation\[\"image\"\] = .*{words}.*, expected uint8 of shape \(height"
    with pytest.raises(EnvironmentOutputError, match=expected % "step"):
        stepped(image=given)
    with pytest.raises(EnvironmentOutputError, match=expected % "reset"):
        output.reset(({"image": given, "prompt": ""}, {}))


@given(
    arrays.arrays(
        st.sampled_from([np.int16, np.uint16, np.int64, np.float32, np.float64, np.complex64, object]),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
        elements=st.sampled_from([0, 1, 2, 255]),
    )
)
def test_any_array_becomes_an_image_of_the_same_numbers_or_is_refused(array: np.ndarray) -> None:
    try:
        image = stepped(image=array)[0]["image"]
    except EnvironmentOutputError:
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    colours = array if array.ndim == 3 else array[:, :, None]
    assert (image == colours[:, :, :3]).all()


@pytest.mark.parametrize("reward", [1, True, np.float32(1), np.int64(1), np.array(1.0), np.array([1.0]), Fraction(1)])
def test_rewards_that_say_the_same_are_converted(reward: Any) -> None:
    result = stepped(reward=reward)[1]
    assert type(result) is float and result == 1.0


@pytest.mark.parametrize(
    "reward",
    [float("nan"), float("inf"), -np.inf, None, "1", 1e39, 10**400, 1j, np.array([1.0, 2.0]), np.float32("nan"), []],
)
def test_rewards_that_are_no_finite_numbers_are_refused(reward: Any) -> None:
    with pytest.raises(EnvironmentOutputError, match="step returned reward = .*, expected a finite real number"):
        stepped(reward=reward)


@pytest.mark.parametrize("field", ["terminated", "truncated", "valid", "success"])
def test_flags(field: str) -> None:
    def result(value: Any) -> Any:
        _, _, terminated, truncated, info = stepped(**{field: value})
        return (info | {"terminated": terminated, "truncated": truncated})[field]

    for value in (True, np.True_, 1, np.array([True])):
        assert result(value) is True
    for value in (False, np.False_, 0, np.array(0)):
        assert result(value) is False
    for value in (None, "no", 2, float("nan"), np.array([True, False])):
        with pytest.raises(EnvironmentOutputError, match=rf"{field}.* = .*, expected true or false"):
            result(value)


@pytest.mark.parametrize("name", ["image", "prompt", "action", "action_labels", "valid", "success"])
def test_a_missing_entry_is_named(name: str) -> None:
    with pytest.raises(EnvironmentOutputError, match=rf"mine/Game-v0: step returned an \w+ without '{name}', only "):
        stepped(**{name: ...})


def test_texts() -> None:
    observation, *_, info = stepped(prompt=np.str_("a\ud83d"), action="type \ud83d")
    assert observation["prompt"] == "a\ufffd" and type(observation["prompt"]) is str
    assert info["action"] == "type \ufffd" and info["extra"] == {1: 2}
    for changes, field in (({"prompt": b"Go."}, "prompt"), ({"action": 3}, "action")):
        with pytest.raises(EnvironmentOutputError, match=rf"{field}\"\] = .*, expected text"):
            stepped(**changes)


def test_the_action_begins_inside_the_utterance_or_nowhere() -> None:
    for start in (0, 3, np.int64(3), np.array([3]), len(UTTERANCE)):
        info = stepped(action_start=start)[4]
        assert type(info["action_start"]) is int and info["action_start"] == start
    assert stepped()[4]["action_start"] is None and stepped(action_start=None)[4]["action_start"] is None
    for start in (-1, len(UTTERANCE) + 1, 2**40, 1.0, True, "3", [1], np.array([1, 2])):
        with pytest.raises(
            EnvironmentOutputError, match=r"action_start\"\] = .*, expected the position .* 0 to 15, or N"
        ):
            stepped(action_start=start)


def test_labels() -> None:
    for labels in ([2, -1], (0, 1), np.array([1, 1], np.int64), np.array([1, 1], np.uint8)):
        result = stepped(action_labels=labels)[4]["action_labels"]
        assert result.dtype == np.int32 and result.tolist() == list(labels)
    for labels in ([3, 0], [0, -2], [1], [[1, 1]], [1.0, 1.0], None, "ab", [[1], [1, 2]], []):
        with pytest.raises(EnvironmentOutputError, match=r"action_labels.*, expected one integer per label head.*3, 2"):
            stepped(action_labels=labels)


def test_other_things_than_a_step_or_a_reset_are_refused() -> None:
    with pytest.raises(EnvironmentOutputError, match=r"step returned result = .*, expected the 5 items"):
        output.step(({"image": IMAGE, "prompt": ""}, 0.0, False, {}), UTTERANCE)
    with pytest.raises(EnvironmentOutputError, match=r"reset returned result = .*, expected the 2 items"):
        output.reset({"image": IMAGE, "prompt": ""})
    with pytest.raises(EnvironmentOutputError, match=r"the observation = .*, expected a dictionary"):
        output.reset((IMAGE, {}))
