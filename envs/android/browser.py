"""The `browser` driver: embedded phones and MiniWoB++ pages in the worker's shared Chromium."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from envs.android.actions import Point
from envs.android.device import Device, DeviceError, DeviceTimeout, Key, Start, decode_picture, settled
from envs.android.loopback import is_of_this_user
from envs.android.phone.content import initial_state
from envs.android.phone.page import phone_html
from envs.drawing import FONTS

#: Id of the process whose environments share a browser; a worker's fork server sets it for the environments it forks.
OWNER_VARIABLE = "COSO_ENVIRONMENTS_OWNER"
_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_START_DEADLINE_S = 40.0
#: Longest wait for a MiniWoB++ page at rest, and shortest time between two captures, seconds.
_SETTLE_S, _FRAME_S = 1.0, 0.03
#: Length prefix of messages to and from the hub.
LENGTH = struct.Struct("<I")


def socket_name(owner_pid: int) -> str:
    """The abstract socket of an owner's hub; it disappears with the hub."""
    return f"\0coso-browser-{os.getuid()}-{owner_pid}"


def find_browser(path: str | None = None) -> str:
    """The Chromium to run: the given path, or the first usual name that exists. Raises DeviceError with what to do."""
    found = shutil.which(path) if path else next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        what = f"there is no program at {path!r}" if path else f"none of {', '.join(_NAMES)} was found"
        raise DeviceError(
            f"embedded phones need a Chromium, but {what}; install one (Debian: apt-get install "
            "chromium-headless-shell) or give its path as browser=..."
        )
    return found


def browser_environment() -> dict[str, str]:
    """This process's environment, with the fonts that ship with the project as the only ones, so that a page looks the
    same whatever fonts a machine has."""
    others = {key: value for key, value in os.environ.items() if not key.startswith("FONTCONFIG_")}
    return others | {"FONTCONFIG_FILE": str(FONTS / "fonts.conf")}


def missing_for_browser() -> str | None:
    """The reason why embedded phones cannot run here, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "the Python package playwright is not installed (pip install 'coso-rl[phones]')"
    try:
        find_browser()
    except DeviceError as error:
        return str(error)
    return None


class BrowserPhone(Device):
    """One embedded phone. Connects to the worker's browser and starts it if needed.

    Not thread-safe. Every call has the deadline `deadline_s`; after a failed call the phone is closed.
    """

    def __init__(
        self,
        browser: str | None = None,
        screen_size: Sequence[int] = (360, 640),
        mobile: bool = True,
        deadline_s: float = 20.0,
    ) -> None:
        """browser: path of a Chromium, None to search for one; screen_size: (width, height), pixels; mobile: whether
        pages use a phone's layout (MiniWoB++ pages are made for desktops)."""
        width, height = (int(size) for size in screen_size)
        self._screen_size = (width, height)
        self._deadline_s = deadline_s
        #: The instruction of the current MiniWoB++ page.
        self.instruction = ""
        owner = int(os.environ.get(OWNER_VARIABLE, os.getpid()))
        executable = find_browser(browser)
        self._socket = _connect(owner, executable)
        try:
            self._call("open", width, height, mobile)
        except DeviceTimeout:
            raise
        except DeviceError:
            # An idle hub that is just closing accepts no phone; connect to the next hub.
            self._socket = _connect(owner, executable)
            self._call("open", width, height, mobile)

    @property
    def screen_size(self) -> tuple[int, int]:
        return self._screen_size

    def reset(self, start: Start) -> None:
        if start.page is not None:
            self.instruction = str(self._call("show_miniwob", miniwob_page(start.page), start.seed))
            return
        # Tasks from a file say nothing of the phone, so it begins as its seed says.
        state = initial_state(start.seed) if start.phone_state is None else start.phone_state
        self.instruction = ""
        self._call("show_phone", phone_html(), state)

    def show_page(self, html: str) -> None:
        """Show a page without an episode."""
        self._call("show_page", html)

    def miniwob_outcome(self) -> dict[str, Any]:
        """The page's own `{"done": bool, "reward": float}`, without its time penalty."""
        return self._call("outcome")

    def screenshot(self) -> NDArray[np.uint8]:
        # The embedded phone draws all changes of an input event before a capture, so its first frame is at rest.
        # MiniWoB++ pages animate dialogs and tabs.
        return settled(self._capture, _SETTLE_S, _FRAME_S) if self.instruction else self._capture()

    def tap(self, at: Point) -> None:
        self._call("tap", *self._pixels(at))

    def swipe(self, touch: Point, lift: Point, duration_s: float = 0.0) -> None:
        self._call("swipe", *self._pixels(touch), *self._pixels(lift), duration_s)

    def text(self, text: str) -> None:
        # A lone surrogate is not a character and cannot be sent.
        self._call("text", text.encode("utf-8", "replace").decode())

    def key(self, key: Key) -> None:
        self._call("key", key)

    def health(self) -> str:
        return str(self._call("health"))

    def inspect(self) -> dict[str, Any]:
        seen = self._call("inspect")
        width, height = self._screen_size
        for target in seen["targets"]:
            target["x"], target["y"] = target["x"] / width, target["y"] / height
        return seen

    def _capture(self) -> NDArray[np.uint8]:
        return decode_picture(self._call("screenshot"), "the browser")

    def close(self) -> None:
        self._socket.close()

    def _pixels(self, at: Point) -> tuple[float, float]:
        # A point on the right or lower edge is moved to the last pixel, which is still on the page.
        return tuple(min(share * size, size - 1) for share, size in zip(at, self._screen_size, strict=True))  # type: ignore[return-value]

    def _call(self, name: str, *arguments: Any) -> Any:
        message = json.dumps([name, arguments]).encode()
        try:
            self._socket.settimeout(self._deadline_s)
            self._socket.sendall(LENGTH.pack(len(message)) + message)
            size = LENGTH.unpack(self._receive(LENGTH.size))[0]
            reply = self._receive(size)
        except TimeoutError:
            self.close()
            raise DeviceTimeout(f"the browser did not answer {name} in {self._deadline_s:g} s") from None
        except OSError as error:
            self.close()
            raise DeviceError(f"the connection to the browser ended during {name}: {error}") from None
        if reply[:1] == b"e":
            raise DeviceError(f"the browser failed: {reply[1:].decode()}")
        return reply[1:] if reply[:1] == b"p" else json.loads(reply[1:])

    def _receive(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            part = self._socket.recv(min(count - len(received), 1 << 20))
            if not part:
                raise ConnectionResetError("the browser or its hub has ended")
            received += part
        return bytes(received)


def miniwob_page(page: str) -> str:
    """The path of a page of the installed `miniwob` package. Raises DeviceError if there is none."""
    if importlib.util.find_spec("miniwob") is None:
        raise DeviceError("MiniWoB++ tasks need the Python package miniwob (pip install 'coso-rl[phones]')")
    path = _miniwob_folder() / f"{page}.html"
    if "/" in page or not path.is_file():
        raise DeviceError(f"MiniWoB++ has no page {page!r}; see {_miniwob_folder()}")
    return str(path)


def _miniwob_folder() -> Path:
    # Importing the package would load Selenium, so only its path is used.
    spec = importlib.util.find_spec("miniwob")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "html" / "miniwob"


def _connect(owner: int, executable: str) -> socket.socket:
    """Connect to the owner's hub; start one if none answers. Raises DeviceError or DeviceTimeout."""
    deadline = time.monotonic() + _START_DEADLINE_S
    hub: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryFile() as errors:
        while True:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                link.connect(socket_name(owner))
            except OSError:
                link.close()
            else:
                if is_of_this_user(link):
                    return link
                link.close()
                raise DeviceError("the browser hub of this worker is not a process of this user")
            if hub is None or hub.poll() == 0:
                hub = _start_hub(owner, executable, errors)
            elif hub.returncode:
                errors.seek(0)
                lines = errors.read().decode("utf-8", "replace").strip().splitlines() or ["no message"]
                raise DeviceError(f"the browser hub ended: {lines[-1]}")
            if time.monotonic() > deadline:
                hub.kill()
                hub.wait()
                raise DeviceTimeout(f"{executable} did not start within {_START_DEADLINE_S:g} s")
            time.sleep(0.02)


def _start_hub(owner: int, executable: str, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    module_path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "envs.android.browser_hub", str(owner), executable],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env=browser_environment() | {"PYTHONPATH": module_path},
        # The hub outlives the phone that started it, and its owner handles Ctrl-C.
        start_new_session=True,
    )
