"""What a phone must be able to do for the environment, whatever drives it, and waiting until its screen rests."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from envs.android.actions import Point

Key = Literal["back", "home", "enter"]


class DeviceError(Exception):
    """A phone, or the way to it, failed: not the agent's doing, so no reward. The message says what and where."""


class DeviceTimeout(DeviceError):
    """A phone did not answer within its deadline."""


@dataclass(frozen=True)
class Start:
    """What a phone is brought to at the beginning of an episode.

    phone_state: the embedded phone's state; None for a device that has a life of its own, and for an embedded phone
    that begins as `seed` says; page: name of the MiniWoB++ page to open instead of the embedded phone, with its seed.
    """

    phone_state: dict[str, Any] | None = None
    page: str | None = None
    seed: int = 0


class Device(Protocol):
    """One phone. Every call raises `DeviceError` when the phone fails, `DeviceTimeout` when it does not answer."""

    @property
    def screen_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""

    def reset(self, start: Start) -> None:
        """Bring the phone to where an episode begins, with nothing left of the episode before."""

    def screenshot(self) -> NDArray[np.uint8]:
        """The screen once it rests, uint8 (height, width, 3), in memory of its own."""

    def tap(self, at: Point) -> None:
        """Touch and lift at one point."""

    def swipe(self, touch: Point, lift: Point, duration_s: float = 0.3) -> None:
        """Touch, move, lift."""

    def text(self, text: str) -> None:
        """Type into what has the focus; any characters, none of which means anything but itself."""

    def key(self, key: Key) -> None:
        """Press a key of the phone."""

    def health(self) -> str:
        """Raise if the phone cannot be used; else a line about it."""

    def close(self) -> None:
        """Let go of the phone; never raises."""


class InspectableDevice(Device, Protocol):
    """A phone that tells its state: the embedded one. Evaluators by state and experts need it."""

    def inspect(self) -> dict[str, Any]:
        """`{"state": ..., "targets": [{"id", "x", "y", "shown"}, ...]}`; x and y are shares of the screen."""


def decode_picture(data: bytes, where: str) -> NDArray[np.uint8]:
    """A PNG as uint8 (height, width, 3). Raises DeviceError where it is damaged or cut short."""
    try:
        # PNG and nothing else: what a device sends is no reason to try every decoder there is.
        with Image.open(io.BytesIO(data), formats=[PngImagePlugin.PngImageFile.format]) as picture:
            return np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DeviceError(f"{where} sent {len(data)} bytes that are no whole picture: {error}") from None


def settled(
    capture: Callable[[], NDArray[np.uint8]],
    deadline_s: float,
    interval_s: float,
    tolerance: float = 0.002,
) -> NDArray[np.uint8]:
    """The first frame that equals the one before it, or the last one when `deadline_s` has passed.

    Two frames are equal where at most a share `tolerance` of pixels differs: a blinking caret is no movement. A screen
    that never rests (a film, a spinner) is answered with what it shows at the deadline: that is a state too.
    interval_s: the least time from one frame to the next; a wait between looks, not a time after which all is well.
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
