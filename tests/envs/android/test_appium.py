"""The Appium driver's failures; what it must do as every driver does is in `test_drivers.py`."""

import contextlib
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from envs.android.appium import AppiumPhone
from envs.android.browser import BrowserPhone
from envs.android.device import DeviceError, DeviceTimeout
from tests.envs.android.appium_stand_in import AppiumStandIn
from tests.envs.android.conftest import free_port


@pytest.fixture
def stand_in(browser_phone: BrowserPhone) -> Iterator[AppiumStandIn]:
    server = AppiumStandIn(browser_phone, seed=3)
    yield server
    server.close()


@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [
        ((500, b'{"value": {"message": "the device fell\\nat line 3"}}'), "refuses .*: the device fell$"),
        ((502, b"<html>"), "refuses .*<html>"),
        ((200, b"not json"), "answered .*not json"),
        ((200, b"[" * 100_000), r"answered .*\[\["),
        ((500, b'{"value":' * 50_000), "refuses "),
        ((200, b'{"value": "%%%"}'), "not base64"),
        ((200, b'{"value": "iVBORw0KGgo="}'), "not a complete picture"),
        ((200, b'{"value": null}'), "not base64"),
    ],
)
def test_a_bad_answer_is_an_error_that_says_so(
    stand_in: AppiumStandIn, trouble: tuple[int, bytes], complaint: str
) -> None:
    phone = AppiumPhone("device", stand_in.url, settle_s=0)
    stand_in.trouble = trouble
    with pytest.raises(DeviceError, match=complaint):
        phone.screenshot()
    assert phone.screenshot().any()
    phone.close()
    phone.close()
    assert not stand_in.sessions
    with pytest.raises(DeviceError, match="closed"):
        phone.screenshot()


def test_a_server_that_hangs_meets_the_deadline(stand_in: AppiumStandIn) -> None:
    phone = AppiumPhone("device", stand_in.url, settle_s=0, deadline_s=0.5)
    tap = stand_in.phone.tap
    stand_in.phone.tap = lambda at: time.sleep(1.0)  # type: ignore[method-assign]
    try:
        with pytest.raises(DeviceTimeout, match=r"did not answer POST .*/actions in 0.5 s"):
            phone.tap((0.5, 0.5))
    finally:
        time.sleep(0.6)
        stand_in.phone.tap = tap  # type: ignore[method-assign]
        phone.close()


def test_without_a_server_the_error_names_its_address() -> None:
    with pytest.raises(DeviceError, match="does not answer POST /session"):
        AppiumPhone("device", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="url"):
        AppiumPhone("device", "file:///etc/passwd")


def test_a_server_that_sends_byte_after_byte_meets_the_deadline() -> None:
    class Dripping(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for _ in range(200):
                    self.request.sendall(b" ")
                    time.sleep(0.05)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dripping) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(DeviceTimeout, match="did not answer POST /session in 0.5 s"):
            AppiumPhone("device", f"http://127.0.0.1:{server.server_address[1]}", start_deadline_s=0.5)
        assert time.monotonic() - started < 5
        server.shutdown()
