"""Checks what an environment returns. A run does this in the environment's own process, before it goes any further.

What has another form and says the same is converted: NumPy numbers, grey images, images of whole numbers in another
dtype. Everything else is an `EnvironmentOutputError` that names the environment, the field, what came and what was
expected. Entries of `info` that no run needs pass as they are.
"""

from __future__ import annotations

import reprlib
import textwrap
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.labels import NOT_APPLICABLE, LabelSpace
from envs.parsing import without_surrogates


class EnvironmentOutputError(ValueError):
    """An environment returned something that the contract of `envs.base.TextActionEnv` does not allow."""


class EnvironmentOutput:
    """The checks for one environment."""

    def __init__(self, env_id: str, label_space: LabelSpace) -> None:
        self._env_id = env_id
        self._label_space = label_space

    def reset(self, returned: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(observation, info) as `Env.reset` returned them. Raises `EnvironmentOutputError`."""
        observation, info = self._items("reset", returned, "(observation, info)")
        return self._observation("reset", observation), self._mapping("reset", "info", info)

    def step(self, returned: Any, utterance: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """(observation, reward, terminated, truncated, info) as `Env.step` returned them for this utterance. Raises
        `EnvironmentOutputError`."""
        names = "(observation, reward, terminated, truncated, info)"
        observation, reward, terminated, truncated, info = self._items("step", returned, names)
        return (
            self._observation("step", observation),
            self._reward(reward),
            self._flag("terminated", terminated),
            self._flag("truncated", truncated),
            self._info(info, len(utterance)),
        )

    def _items(self, method: str, returned: Any, names: str) -> tuple[Any, ...]:
        count = names.count(",") + 1
        if not isinstance(returned, tuple) or len(returned) != count:
            raise self._wrong(method, "result", returned, f"the {count} items {names}")
        return returned

    def _mapping(self, method: str, field: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self._wrong(method, field, value, "a dictionary")
        return dict(value)

    def _entry(self, method: str, field: str, entries: dict[str, Any], name: str) -> Any:
        if name not in entries:
            present = ", ".join(map(reprlib.repr, entries)) or "nothing"
            raise EnvironmentOutputError(f"{self._env_id}: {method} returned {field} without {name!r}, only {present}")
        return entries[name]

    def _observation(self, method: str, value: Any) -> dict[str, Any]:
        entries = self._mapping(method, "the observation", value)
        image = self._entry(method, "an observation", entries, "image")
        prompt = self._entry(method, "an observation", entries, "prompt")
        if not isinstance(prompt, str):
            raise self._wrong(method, 'observation["prompt"]', prompt, "text")
        return entries | {"image": self._image(method, image), "prompt": without_surrogates(str(prompt))}

    def _image(self, method: str, value: Any) -> NDArray[np.uint8]:
        image = _as_rgb(value) if isinstance(value, np.ndarray) else None
        if image is None:
            raise self._wrong(method, 'observation["image"]', value, "uint8 of shape (height, width, 3)")
        return image

    def _reward(self, value: Any) -> float:
        number = _only_item(value)
        try:
            reward = float(number) if isinstance(number, Real) else np.nan
        except OverflowError:  # an integer of more than 308 digits
            reward = np.inf
        if not abs(reward) <= float(np.finfo(np.float32).max):  # runs store rewards as float32
            raise self._wrong("step", "reward", value, "a finite real number")
        return reward

    def _flag(self, field: str, value: Any) -> bool:
        item = _only_item(value)
        if not isinstance(item, Real) or item not in (0, 1):
            raise self._wrong("step", field, value, "true or false")
        return bool(item)

    def _info(self, value: Any, utterance_length: int) -> dict[str, Any]:
        info = self._mapping("step", "info", value)
        action, labels, valid, success = (
            self._entry("step", "an info", info, name) for name in ("action", "action_labels", "valid", "success")
        )
        if not isinstance(action, str):
            raise self._wrong("step", 'info["action"]', action, "text")
        return info | {
            "action_start": self._action_start(info.get("action_start"), utterance_length),
            "action": without_surrogates(str(action)),
            "action_labels": self._labels(labels),
            "valid": self._flag('info["valid"]', valid),
            "success": self._flag('info["success"]', success),
        }

    def _action_start(self, value: Any, utterance_length: int) -> int | None:
        start = _only_item(value)
        if start is None:
            return None
        if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= utterance_length:
            expected = f"the position of a character of the utterance, 0 to {utterance_length}, or None"
            raise self._wrong("step", 'info["action_start"]', value, expected)
        return int(start)

    def _labels(self, value: Any) -> NDArray[np.int32]:
        sizes = self._label_space.sizes
        expected = f"one integer per label head, from {NOT_APPLICABLE} to below {list(sizes)}"
        try:
            labels = np.asarray(value)
        except ValueError:  # lists of several lengths
            raise self._wrong("step", 'info["action_labels"]', value, expected) from None
        if labels.dtype.kind not in "iu" or labels.shape != (len(sizes),):
            raise self._wrong("step", 'info["action_labels"]', value, expected)
        if ((labels < NOT_APPLICABLE) | (labels >= sizes)).any():
            raise self._wrong("step", 'info["action_labels"]', value, expected)
        return labels.astype(np.int32)

    def _wrong(self, method: str, field: str, value: Any, expected: str) -> EnvironmentOutputError:
        return EnvironmentOutputError(
            f"{self._env_id}: {method} returned {field} = {_described(value)}, expected {expected}"
        )


def _as_rgb(image: NDArray[Any]) -> NDArray[np.uint8] | None:
    """The image as uint8 (H, W, 3), from grey, RGB or opaque RGBA in any dtype; None where that would change it."""
    if image.size == 0 or image.dtype.kind not in "uif":
        return None
    if image.dtype != np.uint8:
        with np.errstate(invalid="ignore"):
            whole = image.astype(np.uint8)
        # Zeros and ones in floats may just as well mean black and white.
        if not np.array_equal(whole, image) or (image.dtype.kind == "f" and image.max() == 1):
            return None
        image = whole
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        return None
    if image.shape[2] == 4 and (image[:, :, 3] != 255).any():
        return None  # what would shine through is unknown
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.ascontiguousarray(image[:, :, :3])


def _only_item(value: Any) -> Any:
    """The Python number in a NumPy number or in an array of one item; any other value as it is."""
    return value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        numbers = f" from {value.min()} to {value.max()}" if value.size and value.dtype.kind in "uif" else ""
        return f"an array of {value.dtype} {value.shape}{numbers}"
    return f"{textwrap.shorten(reprlib.repr(value), 80, placeholder='…')} ({type(value).__name__})"
