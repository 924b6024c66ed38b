"""Devices for `benchmarks/phones.py`: one with a still screen, one that is slow, and one that fails."""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any

import numpy as np

from envs.android.actions import Point
from envs.android.browser import BrowserPhone
from envs.android.device import Device, DeviceError, Key, Start
from envs.android.evaluators import Evaluator, Moment, Verdict

SCREEN = (360, 640)


class StillShell:
    """A device that returns one picture immediately, so that only adb and the driver take time."""

    def __init__(self) -> None:
        from envs.android.device_server import EmbeddedPhoneShell
        from envs.android.phone.content import initial_state

        phone = BrowserPhone()
        shell = EmbeddedPhoneShell(phone)
        phone.reset(Start(initial_state(3)))
        self.screens = {"screencap -p": shell.screen(True), "screencap": shell.screen(False)}
        phone.close()

    def __call__(self, command: str) -> tuple[int, bytes]:
        if command in self.screens:
            return 0, self.screens[command]
        return 0, b"1\n" if command.startswith("getprop") else b""


def serve_still(port: int) -> None:
    """Run a device server in this process; for a separate process, like a device."""
    from envs.android.device_server import DeviceServer

    async def run() -> None:
        await DeviceServer(StillShell()).start(port)
        await asyncio.Event().wait()

    asyncio.run(run())


class SlowDevice(Device):
    """A device with a still screen whose actions take a log-normal time, like an emulator's."""

    def __init__(self, mean_s: float, sigma: float) -> None:
        self._screen = np.random.default_rng(0).integers(0, 255, (SCREEN[1], SCREEN[0], 3), np.uint8)
        self._rng = random.Random(os.getpid())
        self._mu, self._sigma = np.log(mean_s) - sigma**2 / 2, sigma
        #: Duration of the last action, seconds.
        self.last_s = 0.0

    @property
    def screen_size(self) -> tuple[int, int]:
        return SCREEN

    def reset(self, start: Start) -> None:
        self.last_s = 0.0

    def screenshot(self) -> np.ndarray:
        return self._screen.copy()

    def tap(self, at: Point) -> None:
        self.last_s = self._rng.lognormvariate(self._mu, self._sigma)
        time.sleep(self.last_s)

    def swipe(self, touch: Point, lift: Point, duration_s: float = 0.3) -> None:
        self.tap(touch)

    def text(self, text: str) -> None:
        self.tap((0, 0))

    def key(self, key: Key) -> None:
        self.tap((0, 0))

    def health(self) -> str:
        return "slow"

    def close(self) -> None:
        pass


class Never(Evaluator):
    """Never reports success; its reward is minus the duration of the device's action in seconds."""

    def verdict(self, moment: Moment) -> Verdict:
        assert isinstance(moment.device, SlowDevice)
        return Verdict(success=False, over=False, reward=-moment.device.last_s)


class FlakyPhone(BrowserPhone):
    """An embedded phone that fails in a share of its calls: raises, hangs past the deadline, or kills its process."""

    def __init__(self, log: str, share: float) -> None:
        self._log, self._share = log, 0.0
        self._rng = random.Random(os.getpid() * 1009 + time.time_ns() % 1000)
        super().__init__()
        self._share = share

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._rng.random() < self._share:
            kind = self._rng.choices(("error", "died", "timeout"), (8, 1, 1))[0]
            # A line is written with one write, so lines of several processes do not mix.
            with open(self._log, "a", encoding="utf-8") as log:
                log.write(f"{kind}\n")
            if kind == "died":
                os._exit(1)
            if kind == "timeout":
                time.sleep(3600)
            raise DeviceError("failed on purpose")
        return super()._call(name, *arguments)
