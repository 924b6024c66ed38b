"""Phones for the tests: a browser, and a real adb server with a device server behind it."""

import asyncio
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from envs.android.adb import AdbPhone
from envs.android.adb_server import AdbServer
from envs.android.browser import BrowserPhone, missing_for_browser
from envs.android.device import DeviceError
from envs.android.device_server import DeviceServer, EmbeddedPhoneShell, Shell

DEADLINE_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def needs_browser() -> None:
    if reason := missing_for_browser():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def adb_port() -> Iterator[int]:
    """A real adb server of the tests' own, on a port of its own."""
    program = shutil.which("adb")
    if program is None:
        pytest.skip("adb is not installed (Debian: apt-get install adb)")
    port = free_port()
    server = subprocess.Popen(
        [program, "-P", str(port), "nodaemon", "server"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                AdbServer(port=port).query("host:version", 2.0)
                break
            except DeviceError:
                assert server.poll() is None and time.monotonic() < deadline, "the adb server did not come up"
                time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


class ServedDevice:
    """A device server in a thread of its own, for whatever shell it is given."""

    def __init__(self, shell: Shell, port: int = 0) -> None:
        self.server = DeviceServer(shell)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port: int = self._do(self.server.start(port))
        self.serial = f"127.0.0.1:{self.port}"

    def hang_up(self) -> None:
        self._loop.call_soon_threadsafe(self.server.hang_up)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._do(self.server.stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(DEADLINE_S)

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_S)


@pytest.fixture
def serve(adb_port: int) -> Iterator[Callable[..., ServedDevice]]:
    """Starts device servers that are stopped, and forgotten by adb, after the test."""
    served: list[ServedDevice] = []

    def start(shell: Shell, port: int = 0) -> ServedDevice:
        served.append(ServedDevice(shell, port))
        return served[-1]

    yield start
    for device in served:
        device.stop()
        AdbServer(port=adb_port).query(f"host:disconnect:{device.serial}", DEADLINE_S)


@pytest.fixture(scope="session")
def browser_phone(needs_browser: None) -> Iterator[BrowserPhone]:
    phone = BrowserPhone()
    yield phone
    phone.close()


@dataclass
class EmbeddedOverAdb:
    """An embedded phone that is driven through adb, and can be looked into past it."""

    phone: AdbPhone
    inside: BrowserPhone
    device: ServedDevice


@pytest.fixture
def embedded_over_adb(adb_port: int, browser_phone: BrowserPhone, serve: Any) -> EmbeddedOverAdb:
    device = serve(EmbeddedPhoneShell(browser_phone, seed=3))
    phone = AdbPhone(device.serial, server_port=adb_port, clear_packages=["org.coso.phone"], frame_s=0.02)
    return EmbeddedOverAdb(phone, browser_phone, device)
