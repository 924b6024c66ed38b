"""The shared browser: one for all phones of a worker, isolated phones, and nothing left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from actors.rollouts.environment_host import EnvironmentFailure, EnvironmentHost
from envs.android.browser import BrowserPhone, find_browser, socket_name
from envs.android.device import DeviceError, DeviceTimeout, Start
from envs.android.phone.content import initial_state
from envs.settings import EnvironmentSettings

pytestmark = pytest.mark.usefixtures("needs_browser")
DEADLINE_S = 30.0


def hubs(owner: int) -> list[psutil.Process]:
    """The hub processes that serve an owner."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "envs.android.browser_hub" in words and str(owner) in words:
            found.append(process)
    return found


def family(hub: psutil.Process) -> list[psutil.Process]:
    return [hub, *hub.children(recursive=True)]


def only_hub(owner: int) -> psutil.Process:
    """The one hub of an owner. Phones that need a browser at the same time each start one, and all but one leave."""
    deadline = time.monotonic() + DEADLINE_S
    while len(found := hubs(owner)) != 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    (hub,) = found
    return hub


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=DEADLINE_S)
    # A process whose parent does not collect it stays as a zombie.
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive), alive


@pytest.fixture
def phone() -> Iterator[BrowserPhone]:
    phone = BrowserPhone()
    phone.reset(Start(initial_state(3)))
    yield phone
    phone.close()


def test_phones_share_a_browser_and_nothing_else(phone: BrowserPhone) -> None:
    other = BrowserPhone()
    try:
        other.reset(Start(initial_state(3)))
        before = other.screenshot()
        phone.tap((0.5, 0.56))
        assert phone.inspect()["state"]["screen"]["app"] == "settings"
        assert other.inspect()["state"]["screen"]["app"] == "launcher"
        assert (other.screenshot() == before).all()
        only_hub(os.getpid())
    finally:
        other.close()


def test_a_phone_that_is_given_no_state_begins_as_its_seed_says(phone: BrowserPhone) -> None:
    phone.reset(Start(seed=4))
    without = phone.inspect()["state"]
    phone.reset(Start(initial_state(4)))
    assert without == phone.inspect()["state"]


def test_a_reset_takes_less_than_100_ms(phone: BrowserPhone) -> None:
    seconds = []
    for seed in range(7):
        started = time.monotonic()
        phone.reset(Start(initial_state(seed)))
        seconds.append(time.monotonic() - started)
    # The best of a few: on a busy machine anything can take long once.
    assert min(seconds) < 0.1


def test_a_phone_reaches_no_network(phone: BrowserPhone) -> None:
    import http.server
    import threading

    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        state = initial_state(3)
        # Typed or loaded text is text: no element of it is made, so nothing is fetched either.
        mischief = f"<img src=http://127.0.0.1:{server.server_port}/x onerror=home()>"
        state["notes"] = [{"title": mischief, "body": mischief}]
        phone.reset(Start(state))
        targets = {target["id"]: target for target in phone.inspect()["targets"]}
        phone.tap((targets["open:notes"]["x"], targets["open:notes"]["y"]))
        seen = phone.inspect()
        assert f"note:{mischief}" in {target["id"] for target in seen["targets"]}
        assert seen["state"]["screen"]["app"] == "notes" and not asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_browser_that_does_not_start_says_why(tmp_path: Any) -> None:
    with pytest.raises(DeviceError, match="apt-get install"):
        find_browser(str(tmp_path / "chromium"))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    script = f"from envs.android.browser import BrowserPhone; BrowserPhone(browser={str(broken)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert f"the browser {broken} did not start" in done.stderr.splitlines()[-1]


def test_a_browser_that_stops_meets_the_deadline() -> None:
    script = (
        "import psutil, os, time\n"
        "from envs.android.browser import BrowserPhone\n"
        "phone = BrowserPhone(deadline_s=2)\n"
        "hub = [p for p in psutil.Process().children() if 'envs.android.browser_hub' in p.cmdline()][0]\n"
        "hub.suspend()\n"
        "try:\n    phone.screenshot()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "hub.resume()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"{DeviceTimeout.__name__} the browser did not answer screenshot in 2 s"), done.stderr


def test_the_browser_ends_with_a_killed_owner() -> None:
    script = (
        "import time\n"
        "from envs.android.browser import BrowserPhone\n"
        "phone = BrowserPhone()\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "up\n"
        left = [process for hub in hubs(owner.pid) for process in family(hub)]
        assert len(left) > 3
        owner.send_signal(signal.SIGKILL)
        wait_until_gone(left)


def test_environments_of_a_worker_share_a_browser_and_outlive_one_another() -> None:
    async def scenario() -> None:
        settings = EnvironmentSettings(id="coso/Android-v0", kwargs={"only": ["open_app"]})
        hosts = [EnvironmentHost(settings) for _ in range(3)]
        try:
            await asyncio.gather(*(host.start() for host in hosts))
            await asyncio.gather(*(host.reset(seed=seed) for seed, host in enumerate(hosts)))
            fork_server = psutil.Process(hosts[0].pid).ppid()
            shared = only_hub(fork_server)
            # The one whose need started the browser goes, by force; the others play on.
            assert hosts[0].pid is not None
            os.kill(hosts[0].pid, signal.SIGKILL)
            with pytest.raises(EnvironmentFailure):
                await hosts[0].step("x")
            for host in hosts[1:]:
                await host.step('{"action": "click", "coordinate": [500, 560]}')
            await hosts[0].restart()
            await hosts[0].reset(seed=1)
            assert only_hub(fork_server) == shared
            # The browser goes: every phone fails, and comes back with a new one.
            shared.kill()
            for host in hosts:
                with pytest.raises(EnvironmentFailure, match="connection to the browser ended"):
                    await host.step("{}" if host.pid is None else '{"action": "click", "coordinate": [500, 560]}')
            await asyncio.gather(*(host.restart() for host in hosts))
            await asyncio.gather(*(host.reset(seed=seed) for seed, host in enumerate(hosts)))
            left = [process for hub in hubs(fork_server) for process in family(hub)]
        finally:
            await asyncio.gather(*(host.close() for host in hosts))
        # With no phone left, the browser goes on its own.
        wait_until_gone(left)

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_the_socket_of_a_hub_is_its_owners() -> None:
    assert socket_name(1) != socket_name(2) and socket_name(1).startswith("\0")
