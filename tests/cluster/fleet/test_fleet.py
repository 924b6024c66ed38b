"""The fleet's agent with a real adb server. Only the emulator itself is faked (`fake_emulator.py`): it needs KVM."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.errors import CosoError
from cluster.fleet import node
from cluster.fleet.agent import AgentOptions, listen, read_options
from cluster.fleet.capacity import Capacity, emulator_count
from cluster.fleet.emulator import EmulatorError, EmulatorOptions, lease_port
from envs.android.device import DeviceError, Start
from envs.android.fleet_client import FleetConnection, FleetPhone
from tests.envs.android.conftest import adb_port  # noqa: F401  (a fixture)

pytestmark = pytest.mark.integration

DEADLINE_S = 40.0
FAKE = Path(__file__).with_name("fake_emulator.py")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fake emulator as a program; files in its folder tell it how to misbehave."""
    program = tmp_path / "emulator"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("COSO_FAKE_EMULATOR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    return program


class RunningAgent:
    def __init__(self, options: AgentOptions, folder: Path) -> None:
        path = folder / "agent.json"
        path.write_text(json.dumps(asdict(options)))
        self.fleet = options.fleet
        self.process = subprocess.Popen([sys.executable, "-m", "cluster.fleet.agent", str(path)])
        self.wait(lambda: self.emulators() is not None, "the agent to answer")

    def emulators(self) -> list[dict[str, Any]] | None:
        try:
            connection = FleetConnection(self.fleet)
        except DeviceError:
            return None
        try:
            return connection.call("status", 10.0)["emulators"]
        finally:
            connection.close()

    def states(self) -> list[str]:
        return [each["state"] for each in self.emulators() or []]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        ends = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < ends, f"waited in vain for {what}: {self.emulators()}"
            time.sleep(0.05)

    def until(self, *states: str) -> list[dict[str, Any]]:
        self.wait(lambda: self.states() == list(states), f"{states}")
        return self.emulators() or []


StartAgent = Callable[..., RunningAgent]


@pytest.fixture
def start_agent(fake: Path, adb_port: int, tmp_path: Path) -> Iterator[StartAgent]:  # noqa: F811
    agents: list[RunningAgent] = []

    def start(count: int, **options: Any) -> RunningAgent:
        emulator = EmulatorOptions("fake-phone", str(fake), adb_port=adb_port)
        deadlines = {"boot_deadline_s": 20.0, "health_s": 0.3, "probe_deadline_s": 5.0}
        restarts = {"restart_backoff_s": 0.1, "quarantine_after": 3}
        values = {**deadlines, **restarts, **options}
        fleet = f"test-{os.getpid()}-{len(agents)}"
        agents.append(RunningAgent(AgentOptions(emulator, count, str(tmp_path), fleet, **values), tmp_path))
        return agents[-1]

    yield start
    for agent in agents:
        agent.process.terminate()
        try:
            agent.process.wait(DEADLINE_S)
        finally:
            agent.process.kill()


def phone(agent: RunningAgent, **options: Any) -> FleetPhone:
    return FleetPhone(agent.fleet, **{"lease_deadline_s": 20.0, "capture": "raw", "settle_s": 0, **options})


def taps(borrowed: FleetPhone) -> int:
    return int(borrowed.screenshot()[0, 0, 0])


def test_emulators_boot_with_serials_of_their_own_and_are_lent_to_one_at_a_time(start_agent: StartAgent) -> None:
    agent = start_agent(2)
    emulators = agent.until("ready", "ready")
    assert len({each["serial"] for each in emulators}) == 2
    first, second = phone(agent), phone(agent)
    assert first.serial != second.serial and agent.states() == ["lent", "lent"]
    first.tap((0.5, 0.5))
    assert (taps(first), taps(second)) == (1, 0)
    with pytest.raises(DeviceError, match=r"no emulator became free within 0.2 s \(0 lent, 1 lent\)"):
        phone(agent, lease_deadline_s=0.2)
    first.close()
    third = phone(agent)
    # What the borrower before did is gone.
    assert third.serial == first.serial and taps(third) == 0
    second.close()
    third.close()
    agent.until("ready", "ready")


def test_a_reset_winds_back_to_the_snapshot(start_agent: StartAgent) -> None:
    borrowed = phone(start_agent(1))
    borrowed.tap((0.5, 0.5))
    assert taps(borrowed) == 1
    borrowed.reset(Start())
    assert taps(borrowed) == 0
    borrowed.close()


def test_an_emulator_that_dies_is_started_again_and_its_borrower_told(start_agent: StartAgent) -> None:
    agent = start_agent(1)
    pid = agent.until("ready")[0]["pid"]
    borrowed = phone(agent)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DeviceError):
        for _ in range(200):
            borrowed.screenshot()
            time.sleep(0.05)
    after = agent.until("ready")[0]
    assert after["restarts"] == 1 and after["pid"] != pid
    # The one whose emulator died holds nothing any more, also when another has it.
    other = phone(agent)
    with pytest.raises(DeviceError, match="restarted; request another lease"):
        borrowed.reset(Start())
    other.tap((0.5, 0.5))
    borrowed.close()
    time.sleep(0.3)
    assert taps(other) == 1 and agent.states() == ["lent"]
    other.close()


def test_an_emulator_that_hangs_is_started_again(start_agent: StartAgent, tmp_path: Path) -> None:
    agent = start_agent(1, boot_deadline_s=2.0)
    before = agent.until("ready")[0]["restarts"]  # a slow machine may have needed more than one boot
    (tmp_path / "hang").touch()
    agent.wait(lambda: (agent.emulators() or [{}])[0].get("restarts", 0) > before, "a restart")
    assert "booted" in (agent.emulators() or [])[0]["trouble"] or agent.states() != ["ready"]
    (tmp_path / "hang").unlink()
    agent.until("ready")


def test_an_emulator_that_never_comes_up_is_left_alone_after_a_while(start_agent: StartAgent, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    found = start_agent(1).until("quarantined")[0]
    assert found["restarts"] == 2 and "exited with code 1" in found["trouble"]
    assert "no such AVD" in (tmp_path / "emulator-0.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_emulators_end_with_the_agent(start_agent: StartAgent, number: signal.Signals) -> None:
    agent = start_agent(2)
    emulators = [psutil.Process(each["pid"]) for each in agent.until("ready", "ready")]
    agent.process.send_signal(number)
    agent.process.wait(DEADLINE_S)
    _, alive = psutil.wait_procs(emulators, timeout=DEADLINE_S)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_ports_are_handed_out_without_clashes(tmp_path: Path) -> None:
    leases = [lease_port(tmp_path) for _ in range(3)]
    assert len({lease.port for lease in leases}) == 3
    leases[0].release()
    again = lease_port(tmp_path)
    assert again.port == leases[0].port
    ports = range(again.port, again.port + 2, 2)
    with pytest.raises(EmulatorError, match="no console port"):
        lease_port(tmp_path, ports)
    again.release()
    with socket.socket() as busy:
        # What another program listens on, be it the console's port or adb's, is left to it.
        # As a server does: connections that earlier tests left behind are in nobody's way.
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        busy.bind(("127.0.0.1", again.port + 1))
        busy.listen()
        with pytest.raises(EmulatorError, match="no console port"):
            lease_port(tmp_path, ports)


def test_how_many_fit() -> None:
    assert emulator_count(None, Capacity(cores=8, memory_mb=64000, kvm=True), 2048) == 8
    assert emulator_count(None, Capacity(cores=64, memory_mb=4096 + 3 * 2816, kvm=True), 2048) == 3
    assert emulator_count(5, Capacity(cores=1, memory_mb=0, kvm=False), 2048) == 5
    with pytest.raises(CosoError, match="KVM"):
        emulator_count(None, Capacity(cores=8, memory_mb=64000, kvm=False), 2048)
    with pytest.raises(CosoError, match="memory"):
        emulator_count(None, Capacity(cores=8, memory_mb=5000, kvm=True), 2048)


def test_options_travel_as_json(tmp_path: Path) -> None:
    options = AgentOptions(EmulatorOptions("a"), 2, str(tmp_path), restart_backoff_s=1.0)
    assert read_options(json.dumps(asdict(options))) == options


def test_the_command_line(fake: Path, adb_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = f"cli-{os.getpid()}"

    def coso(*words: str) -> str:
        result = CliRunner().invoke(app, ["fleet", *words], catch_exceptions=True)
        if isinstance(result.exception, CosoError):
            return f"error: {result.exception}"
        assert result.exception is None, result.exception
        return result.output

    assert "coso fleet start" in coso("status", "--fleet", name)
    start = ("start", "--avd", "fake-phone", "--adb-port", str(adb_port), "--fleet", name)
    assert "emulator program 'nowhere' not found" in coso(*start, "--emulator", "nowhere")
    assert "adb start-server" in coso(*start[:4], "1", *start[5:], "--emulator", str(fake))
    try:
        shown = coso(*start, "--emulator", str(fake), "--count", "2")
        assert "ray start" in shown and "is already running" in coso(*start, "--emulator", str(fake), "--count", "1")
        report = json.loads(coso("status", "--fleet", name, "--json"))
        assert [each["state"] for each in report["emulators"]] == ["ready", "ready"]
        agent = psutil.Process(report["pid"])
    finally:
        stopped = coso("stop", "--fleet", name)
    assert "has stopped" in stopped
    assert not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE


def test_an_agent_that_ends_at_once_is_told_from_one_that_is_slow(tmp_path: Path) -> None:
    fleet = f"taken-{os.getpid()}"
    with listen(fleet):  # bound, but nobody answers
        options = AgentOptions(EmulatorOptions("avd"), 1, str(tmp_path), fleet)
        with pytest.raises(CosoError, match=r"ended with code 1 before it answered; see .*taken.*-agent\.log"):
            node.start_agent(options, tmp_path)
    assert "already has an agent" in (tmp_path / f"{fleet}-agent.log").read_text()


@pytest.mark.parametrize("gone", [False, True])
def test_stopping_an_agent_leaves_no_handle_open(gone: bool) -> None:
    """The agent answers once, with its number, and hangs up; or the number is of no process any more."""
    fleet = f"brief-{os.getpid()}"
    with listen(fleet) as listener, subprocess.Popen(["sleep", "60"]) as agent:
        listener.listen()
        if gone:
            agent.kill()
            agent.wait()

        def answer() -> None:
            with listener.accept()[0] as link:
                link.recv(1000)
                link.sendall(json.dumps({"pid": agent.pid}).encode() + b"\n")
                if not gone:
                    link.recv(1000)

        server = threading.Thread(target=answer)
        server.start()
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(CosoError, match="ended by itself" if gone else "closed the connection"):
            node.stop_agent(fleet)
        server.join(DEADLINE_S)
        assert len(os.listdir("/proc/self/fd")) <= before
        agent.kill()


@pytest.mark.parametrize("planted", ["open", "link"])
def test_a_folder_that_others_can_write_to_is_not_used(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = node.agent_folder()
    assert node.agent_folder() == folder and folder.stat().st_mode & 0o777 == 0o700
    if planted == "open":
        folder.chmod(0o777)
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CosoError, match="not a folder of this user alone"):
        node.agent_folder()


def test_another_users_agent_is_not_spoken_to(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen(fleet := f"foreign-{os.getpid()}") as listener:
        listener.listen()
        other, name = os.getuid() + 1, listener.getsockname()
        monkeypatch.setattr("envs.android.fleet_client.socket_name", lambda _: name)
        monkeypatch.setattr(os, "getuid", lambda: other)
        with pytest.raises(DeviceError, match="not a process of this user"):
            FleetConnection(fleet)
