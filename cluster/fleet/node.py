"""Start, query and stop the agent of this node's emulators."""

from __future__ import annotations

import json
import os
import select
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.errors import CosoError
from cluster.fleet.agent import AgentOptions
from envs.android.device import DeviceError
from envs.android.fleet_client import FleetConnection

CALL_DEADLINE_S = 10.0
_AGENT_DEADLINE_S = 30.0
_STOP_DEADLINE_S = 60.0


def running_emulators(fleet: str = "default") -> int | None:
    """Number of emulators of this node's agent; None if no agent runs."""
    try:
        return len(status(fleet)["emulators"])
    except CosoError:
        return None


def agent_folder() -> Path:
    """The folder of this user's agents, for options, logs and port locks. Raises `CosoError` if another user made it,
    or can write there."""
    folder = Path(tempfile.gettempdir()) / f"coso-fleet-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise CosoError(f"{folder} is not a folder of this user alone; remove it, or set TMPDIR to another place")
    return folder


def start_agent(options: AgentOptions, folder: Path) -> subprocess.Popen[bytes]:
    """Start the agent and return its process once it answers. Raises `CosoError`."""
    path = folder / f"{options.fleet}.json"
    path.write_text(json.dumps(asdict(options)), "utf-8")
    log = folder / f"{options.fleet}-agent.log"
    with log.open("ab") as output:
        agent = subprocess.Popen(
            [sys.executable, "-m", "cluster.fleet.agent", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    ends = time.monotonic() + _AGENT_DEADLINE_S
    while running_emulators(options.fleet) is None:
        if agent.poll() is not None:
            raise CosoError(f"the fleet's agent ended with code {agent.returncode} before it answered; see {log}")
        if time.monotonic() > ends:
            agent.kill()
            agent.wait()
            raise CosoError(f"the fleet's agent did not answer within {_AGENT_DEADLINE_S:g} s; see {log}")
        time.sleep(0.05)
    return agent


def wait_for_boot(fleet: str, agent: subprocess.Popen[bytes], deadline_s: float) -> None:
    """Return when every emulator has booted or failed. Raises `CosoError` at the deadline (seconds)."""
    ends = time.monotonic() + deadline_s + _AGENT_DEADLINE_S
    while time.monotonic() < ends:
        emulators = status(fleet)["emulators"]
        if all(each["state"] in ("ready", "lent", "quarantined") or each["trouble"] for each in emulators):
            return
        if agent.poll() is not None:
            raise CosoError("the fleet's agent ended while its emulators were booting; see its log")
        time.sleep(0.2)
    raise CosoError(f"not all emulators booted within {deadline_s:g} s; see `coso fleet status`")


def _connect(fleet: str) -> FleetConnection:
    try:
        return FleetConnection(fleet)
    except DeviceError as error:
        raise CosoError(str(error)) from None


def status(fleet: str) -> dict[str, Any]:
    """The agent's status. Raises `CosoError` if no agent runs."""
    connection = _connect(fleet)
    try:
        return connection.call("status", CALL_DEADLINE_S)
    except DeviceError as error:
        raise CosoError(str(error)) from None
    finally:
        connection.close()


def stop_agent(fleet: str) -> None:
    """Stop this node's agent and its emulators. Raises `CosoError`."""
    connection = _connect(fleet)
    handle = -1
    try:
        pid = connection.call("status", CALL_DEADLINE_S)["pid"]
        handle = os.pidfd_open(pid)
        connection.call("stop", CALL_DEADLINE_S)
        if not select.select([handle], [], [], _STOP_DEADLINE_S)[0]:
            raise CosoError(f"the fleet's agent (process {pid}) did not stop within {_STOP_DEADLINE_S:g} s")
    except ProcessLookupError:
        raise CosoError(f"the fleet's agent (process {pid}) ended by itself, before it was asked to stop") from None
    except DeviceError as error:
        raise CosoError(str(error)) from None
    finally:
        connection.close()
        if handle >= 0:
            os.close(handle)
