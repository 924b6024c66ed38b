"""The `appium` driver: a device behind an Appium server with UiAutomator2.

It uses the W3C WebDriver protocol and UiAutomator2's `mobile:` commands over HTTP, without an Appium client.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.android.actions import Point
from envs.android.device import Device, DeviceError, DeviceTimeout, Key, Start, decode_picture, settled
from envs.android.loopback import open_url
from envs.http import read_within, refusal

_KEY_CODES = {"back": 4, "home": 3, "enter": 66}
_TAP_MS = 50
#: A screenshot of any phone is smaller, bytes.
_LARGEST_ANSWER = 64 << 20


class AppiumPhone(Device):
    """A session on an Appium server; `close` ends the session."""

    def __init__(
        self,
        serial: str,
        url: str = "http://127.0.0.1:4723",
        clear_packages: Sequence[str] = (),
        capabilities: dict[str, Any] | None = None,
        deadline_s: float = 30.0,
        start_deadline_s: float = 50.0,
        settle_s: float = 3.0,
        frame_s: float = 0.1,
    ) -> None:
        """serial: the device, as in `adb devices`; url: of the server; clear_packages: apps whose data a reset clears;
        capabilities: further ones of the session, for instance {"appium:systemPort": 8201}. Times are in seconds, as
        for `AdbPhone`; start_deadline_s: for the start of the session, when Appium may install its helper app."""
        if not re.fullmatch(r"https?://[^\s]+", url):
            raise ValueError(f"appium: url must begin with http:// or https://, not {url!r}")
        self._url = url.rstrip("/")
        self._deadline_s = deadline_s
        self._settle_s, self._frame_s = settle_s, frame_s
        self._clear_packages = tuple(clear_packages)
        wanted = {
            "platformName": "Android",
            "appium:automationName": "UiAutomator2",
            "appium:udid": serial,
            "appium:noReset": True,
            "appium:newCommandTimeout": 3600,
            **(capabilities or {}),
        }
        self._session: str | None = None
        request = {"capabilities": {"alwaysMatch": wanted, "firstMatch": [{}]}}
        started = self._ask("POST", "/session", request, start_deadline_s)
        if not isinstance(started, dict) or not isinstance(started.get("sessionId"), str):
            raise DeviceError(f"Appium at {self._url} did not start a session: {started!r}")
        self._session = started["sessionId"]
        self._screen_size = (0, 0)
        self.capture()

    @property
    def screen_size(self) -> tuple[int, int]:
        return self._screen_size

    def reset(self, start: Start) -> None:
        """Clear the apps in `clear_packages` and go to the home screen."""
        for package in self._clear_packages:
            self._mobile("clearApp", appId=package)
        self.key("home")

    def screenshot(self) -> NDArray[np.uint8]:
        return settled(self.capture, self._settle_s, self._frame_s) if self._settle_s > 0 else self.capture()

    def capture(self) -> NDArray[np.uint8]:
        """The current screen, uint8 (height, width, 3)."""
        picture = read_screenshot(self._in_session("GET", "/screenshot"), f"Appium at {self._url}")
        self._screen_size = (picture.shape[1], picture.shape[0])
        return picture

    def tap(self, at: Point) -> None:
        self._touch([at], 0.0)

    def swipe(self, touch: Point, lift: Point, duration_s: float = 0.3) -> None:
        self._touch([touch, lift], duration_s)

    def text(self, text: str) -> None:
        if text:
            self._mobile("type", text=text.encode("utf-8", "replace").decode())

    def key(self, key: Key) -> None:
        self._mobile("pressKey", keycode=_KEY_CODES[key])

    def health(self) -> str:
        status = self._ask("GET", "/status", None, self._deadline_s)
        if not isinstance(status, dict) or not status.get("ready"):
            raise DeviceError(f"Appium at {self._url} is not ready: {status!r}")
        return f"Appium at {self._url}: {status.get('message', 'ready')}"

    def close(self) -> None:
        if self._session is not None:
            with contextlib.suppress(DeviceError):
                self._in_session("DELETE", "")
            self._session = None

    def _touch(self, points: Sequence[Point], duration_s: float) -> None:
        width, height = self._screen_size
        pixels = [(min(int(x * width), width - 1), min(int(y * height), height - 1)) for x, y in points]
        moves: list[dict[str, Any]] = [
            {"type": "pointerMove", "duration": round(1000 * duration_s) if index else 0, "x": x, "y": y}
            for index, (x, y) in enumerate(pixels)
        ]
        press, lift = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        held = moves[1:] or [{"type": "pause", "duration": _TAP_MS}]
        finger = {
            "type": "pointer",
            "id": "finger",
            "parameters": {"pointerType": "touch"},
            "actions": [moves[0], press, *held, lift],
        }
        self._in_session("POST", "/actions", {"actions": [finger]})

    def _mobile(self, name: str, **arguments: Any) -> Any:
        return self._in_session("POST", "/execute/sync", {"script": f"mobile: {name}", "args": [arguments]})

    def _in_session(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        if self._session is None:
            raise DeviceError("the Appium session is closed")
        return self._ask(method, f"/session/{self._session}{path}", body, self._deadline_s)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, deadline_s: float) -> Any:
        """The `value` of the server's answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json; charset=utf-8"}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        what = f"{method} {path}"
        try:
            with open_url(request, deadline_s) as response:
                answer = read_within(response, deadline_s, _LARGEST_ANSWER)
        except urllib.error.HTTPError as error:
            raise DeviceError(
                f"Appium at {self._url} refuses {what}: {error_message(refusal(error, 20_000))}"
            ) from None
        except TimeoutError:
            raise DeviceTimeout(f"Appium at {self._url} did not answer {what} in {deadline_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise DeviceTimeout(f"Appium at {self._url} did not answer {what} in {deadline_s:g} s") from None
            raise DeviceError(f"Appium at {self._url} does not answer {what}: {error}") from None
        return read_value(answer, f"Appium at {self._url}", what)


def read_value(answer: bytes, where: str, what: str) -> Any:
    """The `value` of a WebDriver answer. Raises `DeviceError`."""
    try:
        return json.loads(answer)["value"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # the last one: JSON that is nested deeply
        raise DeviceError(f"{where} answered {what} with {answer[:200]!r}") from error


def read_screenshot(value: Any, where: str) -> NDArray[np.uint8]:
    """The picture in the value of an answer, uint8 (height, width, 3). Raises `DeviceError`."""
    try:
        data = base64.b64decode(value, validate=True)
    except (ValueError, TypeError) as error:
        raise DeviceError(f"{where} sent a screenshot that is not base64: {error}") from None
    return decode_picture(data, where)


def error_message(answer: bytes) -> str:
    """The message of a WebDriver error, or the raw answer."""
    try:
        return str(json.loads(answer)["value"]["message"]).splitlines()[0]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return repr(answer[:200])
