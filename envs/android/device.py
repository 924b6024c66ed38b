"""The interface of a phone for all drivers, and waiting until its screen is at rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from envs.android.actions import Point
from envs.png import UnreadableImage, decode_png

Key = Literal["back", "home", "enter"]


class DeviceError(Exception):
    """A phone or the connection to it failed. The agent did not cause it, so it gives no reward. The message says what
    failed and where."""


class DeviceTimeout(DeviceError):
    """A phone did not answer within its deadline."""


@dataclass(frozen=True)
class Start:
    """The state of a phone at the start of an episode.

    phone_state: the embedded phone's state; None for a device that has a life of its own, and for an embedded phone
    that begins as `seed` says; page: name of the MiniWoB++ page to open instead of the embedded phone, with its seed.
    """

    phone_state: dict[str, Any] | None = None
    page: str | None = None
    seed: int = 0


class Device(Protocol):
    """One phone. Every call raises `DeviceError` if the phone fails, `DeviceTimeout` if it does not answer."""

    @property
    def screen_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""

    def reset(self, start: Start) -> None:
        """Set the phone to the start of an episode, without traces of the previous one."""

    def screenshot(self) -> NDArray[np.uint8]:
        """The screen once it is at rest, a new uint8 (height, width, 3) array."""

    def tap(self, at: Point) -> None:
        """Touch and lift at one point."""

    def swipe(self, touch: Point, lift: Point, duration_s: float = 0.3) -> None:
        """Touch, move, lift."""

    def text(self, text: str) -> None:
        """Type any text literally into the focused element."""

    def key(self, key: Key) -> None:
        """Press a key of the phone."""

    def health(self) -> str:
        """A one-line description of the phone; raises if it cannot be used."""

    def close(self) -> None:
        """Release the phone; never raises."""


class InspectableDevice(Device, Protocol):
    """A phone that reports its state: the embedded one. The state evaluator and the expert need it."""

    def inspect(self) -> dict[str, Any]:
        """`{"state": ..., "targets": [{"id", "x", "y", "shown"}, ...]}`; x and y are shares of the screen."""


def decode_picture(data: bytes, where: str) -> NDArray[np.uint8]:
    """Decode a PNG to uint8 (height, width, 3). Raises DeviceError if it is damaged or incomplete."""
    try:
        return np.array(decode_png(data))
    except UnreadableImage as error:
        raise DeviceError(f"{where} sent {error}") from None


def settled(
    capture: Callable[[], NDArray[np.uint8]],
    deadline_s: float,
    interval_s: float,
    tolerance: float = 0.002,
) -> NDArray[np.uint8]:
    """The first frame that equals the previous one, or the last frame at `deadline_s`, for a screen that never rests (a
    film, a spinner).

    Two frames are equal if at most a share `tolerance` of their pixels differs, so a blinking caret does not count.
    interval_s: shortest time between two frames, seconds.
    """
    deadline = time.monotonic() + deadline_s
    before = capture()
    while time.monotonic() < deadline:
        time.sleep(interval_s)
        now = capture()
        if now.shape == before.shape and (now != before).any(axis=2).mean() <= tolerance:
            return now
        before = now
    return before
