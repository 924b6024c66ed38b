"""Spaces of pictures and of arbitrary strings."""

from __future__ import annotations

import string
from typing import Any, Never

import gymnasium
import numpy as np
from gymnasium.vector.utils import create_shared_memory


class AnyText(gymnasium.spaces.Text):
    """The space of all strings; gymnasium's `Text` would need all of Unicode as its character set.

    Samples are printable ASCII of up to `max_sample_length` characters.
    """

    def __init__(self, max_sample_length: int = 200, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_sample_length, min_length=0, charset=string.printable, seed=seed)

    def contains(self, x: Any) -> bool:
        """Whether x is a string, of any length and characters."""
        return isinstance(x, str)

    def __repr__(self) -> str:
        return f"AnyText(max_sample_length={self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText) and self.max_length == other.max_length


def image_space(shape: tuple[int, int, int]) -> gymnasium.spaces.Box:
    """The space of RGB pictures uint8 (H, W, 3), with bounds that take almost no memory.

    A plain `Box` keeps four arrays of its shape, a megabyte for pictures of 300 × 300.
    """
    box = gymnasium.spaces.Box(0, 255, shape, np.uint8)
    for name in ("low", "high", "bounded_below", "bounded_above"):
        value = getattr(box, name)
        setattr(box, name, np.broadcast_to(value.flat[0], shape))
    return box


@create_shared_memory.register(AnyText)
def _refuse_shared_memory(space: AnyText, n: int = 1, ctx: Any = None) -> Never:
    # Otherwise gymnasium would silently return the initial text of its shared memory at every step.
    raise gymnasium.error.CustomSpaceError("texts cannot be shared in memory: give AsyncVectorEnv shared_memory=False")
