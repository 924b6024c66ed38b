"""A phone that keeps the drivers' contract, a picture in memory, and versions of it with one fault each."""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.android.device import Device, DeviceError, Start


class Phone(Device):
    """Taps colour what they touch, home and a reset clear the screen."""

    def __init__(self) -> None:
        self._open = True
        self._screen = self._blank()

    def _blank(self) -> np.ndarray:
        return np.indices((40, 20)).sum(axis=0)[:, :, None].repeat(3, axis=2).astype(np.uint8)

    def _require_open(self) -> None:
        if not self._open:
            raise DeviceError("the phone is closed")

    @property
    def screen_size(self) -> tuple[int, int]:
        return 20, 40

    def reset(self, start: Start) -> None:
        self._screen = self._blank()

    def screenshot(self) -> np.ndarray:
        return self._screen.copy()

    def tap(self, at: Any) -> None:
        self._require_open()
        x, y = min(int(at[0] * 20), 19), min(int(at[1] * 40), 39)
        self._screen[y - 4 : y + 5, x - 4 : x + 5] = 255

    def swipe(self, touch: Any, lift: Any, duration_s: float = 0.3) -> None:
        self.tap(lift)

    def text(self, text: str) -> None:
        self._require_open()

    def key(self, key: Any) -> None:
        if key == "home":
            self._screen = self._blank()

    def health(self) -> str:
        return "a phone in memory"

    def close(self) -> None:
        self._open = False


class OneBuffer(Phone):
    def screenshot(self) -> np.ndarray:
        return self._screen


class WidthFirst(Phone):
    def screenshot(self) -> np.ndarray:
        return self._screen.transpose(1, 0, 2).copy()


class Dark(Phone):
    def screenshot(self) -> np.ndarray:
        return np.zeros_like(self._screen)


class Wordless(Phone):
    def health(self) -> str:
        return ""


class OffTheEdge(Phone):
    def tap(self, at: Any) -> None:
        self._require_open()
        self._screen[int(at[1] * 40), int(at[0] * 20)] = 255


class NoHome(Phone):
    def key(self, key: Any) -> None:
        pass


class Ascii(Phone):
    def text(self, text: str) -> None:
        text.encode("ascii")


class Remembers(Phone):
    def reset(self, start: Start) -> None:
        pass


class LostTargets(Phone):
    def inspect(self) -> dict[str, Any]:
        return {"state": {}, "targets": [{"id": "ok", "x": 180.0, "y": 20.0, "shown": True}]}


class ClosesOnce(Phone):
    def close(self) -> None:
        self._require_open()
        self._open = False
