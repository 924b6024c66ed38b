"""The `adb` driver: a real phone or emulator, through the adb server's socket."""

from __future__ import annotations

import base64
import contextlib
import logging
import re
import shlex
import struct
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from envs.android.actions import Point
from envs.android.adb_server import DEFAULT_PORT, AdbServer, DeviceGone
from envs.android.device import Device, DeviceError, DeviceTimeout, Key, Start, decode_picture, settled

logger = logging.getLogger(__name__)

Capture = Literal["png", "raw"]
Keyboard = Literal["auto", "adbkeyboard", "input"]
Result = TypeVar("Result")

#: The input method that receives text as base64, for characters that `input text` cannot type.
ADB_KEYBOARD = "com.android.adbkeyboard/.AdbIME"
_KEY_CODES = {"back": "KEYCODE_BACK", "home": "KEYCODE_HOME", "enter": "KEYCODE_ENTER"}
_PACKAGE = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)+")
_RAW_HEADER = struct.Struct("<III")
_RGBA_8888 = 1
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: On a device with several displays, `screencap` writes a warning before the picture. It is skipped, up to this length.
_LONGEST_WARNING = 8192
_TEXT_LINE = re.compile(rb"[\t\x20-\x7e]*\r?\n")
_RECONNECT_PAUSE_S = 0.2


class AdbPhone(Device):
    """A device that the adb server knows or can reach over the network.

    Commands for the device's shell consist of numbers, fixed words, base64 and one quoted argument, so text from an
    agent is never read as syntax. If the server loses a network device before a call has had any effect, the call
    reconnects within `reconnect_s`; otherwise the call fails.
    """

    def __init__(
        self,
        serial: str,
        server_host: str = "127.0.0.1",
        server_port: int = DEFAULT_PORT,
        capture: Capture = "png",
        keyboard: Keyboard = "auto",
        clear_packages: Sequence[str] = (),
        display: int | None = None,
        input_display: int | None = None,
        deadline_s: float = 10.0,
        settle_s: float = 3.0,
        frame_s: float = 0.1,
        reconnect_s: float = 5.0,
    ) -> None:
        """serial: as in `adb devices`, or host:port; capture: format of screenshots ("raw" is faster over loopback and
        USB 3, "png" over a network); keyboard: how to type text, "auto" uses the ADB keyboard if it is the device's
        input method, else `input text`, which types only ASCII; clear_packages: apps whose data a reset clears;
        display: which of several displays is captured, an id of `dumpsys SurfaceFlinger --display-id`; input_display:
        which of them is touched, an id of `dumpsys display` (0 is the main one). None: the device's main display.

        Times are in seconds. deadline_s: of every call; settle_s: longest wait for a screen at rest (0: take one
        capture at once); frame_s: shortest time between two captures.
        """
        for package in clear_packages:
            if not _PACKAGE.fullmatch(package):
                raise ValueError(f"clear_packages names Android packages such as com.android.chrome, not {package!r}")
        if keyboard not in ("auto", "adbkeyboard", "input") or capture not in ("png", "raw"):
            raise ValueError(f"keyboard {keyboard!r} or capture {capture!r} is unknown: see the docstring of AdbPhone")
        for number in (display, input_display):
            if number is not None and (type(number) is not int or number < 0):
                raise ValueError(f"display and input_display are numbers of displays, not {number!r}")
        self._serial = serial
        self._server = AdbServer(server_host, server_port)
        self._capture_how = capture
        self._screencap = "screencap" if display is None else f"screencap -d {display}"
        self._input = "input" if input_display is None else f"input -d {input_display}"
        self._clear_packages = tuple(clear_packages)
        self._deadline_s = deadline_s
        self._settle_s = settle_s
        self._frame_s = frame_s
        self._reconnect_s = reconnect_s
        self.health()
        self._adb_keyboard = keyboard == "adbkeyboard" or (
            keyboard == "auto" and self.shell("settings get secure default_input_method").strip() == ADB_KEYBOARD
        )
        self._screen_size = (0, 0)
        self.capture()

    @property
    def serial(self) -> str:
        """The device's name in `adb devices`."""
        return self._serial

    @property
    def screen_size(self) -> tuple[int, int]:
        return self._screen_size

    def reset(self, start: Start) -> None:
        """Clear the apps in `clear_packages` and go to the home screen; a real device cannot be set to a state."""
        for package in self._clear_packages:
            self.shell(f"pm clear {package}")
        self.key("home")

    def screenshot(self) -> NDArray[np.uint8]:
        if self._settle_s <= 0:
            return self.capture()
        return settled(self.capture, self._settle_s, self._frame_s)

    def capture(self) -> NDArray[np.uint8]:
        """The current screen, uint8 (height, width, 3)."""
        command = f"{self._screencap} -p" if self._capture_how == "png" else self._screencap
        data = self._on_device(lambda: self._server.exec(self._serial, command, self._deadline_s))
        where = f"screencap on {self._serial}"
        picture = _decode_png(data, where) if self._capture_how == "png" else _decode_raw(data, where)
        # A device may be rotated; taps use the size of the shown screen.
        self._screen_size = (picture.shape[1], picture.shape[0])
        return picture

    def tap(self, at: Point) -> None:
        x, y = self._pixels(at)
        self.shell(f"{self._input} tap {x} {y}")

    def swipe(self, touch: Point, lift: Point, duration_s: float = 0.3) -> None:
        (x1, y1), (x2, y2) = self._pixels(touch), self._pixels(lift)
        self.shell(f"{self._input} swipe {x1} {y1} {x2} {y2} {round(duration_s * 1000)}")

    def text(self, text: str) -> None:
        for command in typing_commands(text, self._adb_keyboard, self._input):
            self.shell(command)

    def key(self, key: Key) -> None:
        self.shell(f"{self._input} keyevent {_KEY_CODES[key]}")

    def health(self) -> str:
        if self.shell("getprop sys.boot_completed").strip() != "1":
            raise DeviceError(f"{self._serial} has not finished booting")
        return f"{self._serial}: {self.shell('getprop ro.product.model').strip()}"

    def close(self) -> None:
        """Do nothing: no connection stays open between calls."""

    def shell(self, command: str) -> str:
        """Standard output of a command line in the device's shell. The caller must ensure that the command is safe."""
        data = self._on_device(lambda: self._server.shell(self._serial, command, self._deadline_s))
        return data.decode("utf-8", "replace")

    def _pixels(self, at: Point) -> tuple[int, int]:
        width, height = self._screen_size
        return min(int(at[0] * width), width - 1), min(int(at[1] * height), height - 1)

    def _on_device(self, call: Callable[[], Result]) -> Result:
        """Execute a call; reconnect a network device if the server does not see it."""
        try:
            return call()
        except DeviceGone:
            if ":" not in self._serial:
                raise
        ends = time.monotonic() + self._reconnect_s
        while True:
            try:
                self._server.connect(self._serial, self._deadline_s)
                return call()
            except DeviceGone as gone:
                if time.monotonic() >= ends:
                    raise DeviceTimeout(
                        f"{self._serial} could not be reconnected within {self._reconnect_s:g} s: {gone}"
                    ) from gone
                logger.info("waiting for %s: %s", self._serial, gone)
                time.sleep(_RECONNECT_PAUSE_S)


def typing_commands(text: str, adb_keyboard: bool, program: str = "input") -> list[str]:
    """The command lines that type a text.

    The ADB keyboard receives the text as base64. `input text` always reads `%s` as a space, so a space is written as
    `%s` and a literal `%s` is split into two commands. Its argument is quoted for the shell. It types only ASCII, so
    other characters are left out. program: `input`, with its options.
    """
    if adb_keyboard:
        if not text:
            return []
        encoded = base64.b64encode(text.encode("utf-8", "replace")).decode()
        return [f"am broadcast -a ADB_INPUT_B64 --es msg {encoded}"]
    plain = "".join(character for character in text if character.isascii() and character != "\0")
    if plain != text:
        logger.warning(
            "left out %d characters that `input text` cannot type; use the ADB keyboard", len(text) - len(plain)
        )
    pieces = plain.replace("%s", "%\0s").split("\0")
    return [f"{program} text {shlex.quote(piece.replace(' ', '%s'))}" for piece in pieces if piece]


def _decode_png(data: bytes, where: str) -> NDArray[np.uint8]:
    """Decode the output of `screencap -p`, from where the picture begins."""
    return decode_picture(data[max(data.find(_PNG_SIGNATURE, 0, _LONGEST_WARNING), 0) :], where)


def _decode_raw(data: bytes, where: str) -> NDArray[np.uint8]:
    """Decode the output of `screencap` without -p: width, height, format (since Android 8 a colour space too), RGBA."""
    starts = [0]
    while line := _TEXT_LINE.match(data, starts[-1], _LONGEST_WARNING):
        starts.append(line.end())
    # The size of a picture may look like text, so the whole is tried first.
    for start in starts[:-1]:
        with contextlib.suppress(DeviceError):
            return _pixels_of(memoryview(data)[start:], where)
    return _pixels_of(memoryview(data)[starts[-1] :], where)


def _pixels_of(data: memoryview, where: str) -> NDArray[np.uint8]:
    if len(data) < _RAW_HEADER.size:
        raise DeviceError(f"{where} sent {len(data)} bytes that are not a picture")
    width, height, pixel_format = _RAW_HEADER.unpack_from(data)
    size = width * height * 4
    if pixel_format != _RGBA_8888:
        raise DeviceError(
            f"{where} sent pixels in format {pixel_format}; only RGBA (1) is supported, use capture='png'"
        )
    header = len(data) - size
    if not size or header not in (_RAW_HEADER.size, _RAW_HEADER.size + 4):
        raise DeviceError(f"{where} sent {len(data)} bytes for {width} × {height} pixels: the picture is incomplete")
    pixels = np.frombuffer(data, np.uint8, count=size, offset=header).reshape(height, width, 4)
    return pixels[:, :, :3].copy()
