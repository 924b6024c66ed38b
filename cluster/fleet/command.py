"""`coso fleet`: start, watch and stop the emulators of this node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.errors import CosoError

if TYPE_CHECKING:
    from envs.android.fleet import FleetConnection

fleet_app = typer.Typer(help="Start, watch and stop the Android emulators of this node.", no_args_is_help=True)

Fleet = Annotated[str, typer.Option(help="Name of the fleet, where a node runs several.")]
_CALL_DEADLINE_S = 10.0
_AGENT_DEADLINE_S = 30.0
_STOP_DEADLINE_S = 60.0


@fleet_app.command()
def start(
    avd: Annotated[
        str, typer.Option(help="Android virtual device that serves as the template (`avdmanager list avd`).")
    ],
    count: Annotated[
        int | None, typer.Option(min=1, help="Emulators; default: as many as cores, memory and KVM of this node allow.")
    ] = None,
    snapshot: Annotated[
        str, typer.Option(help="Snapshot of the template to boot from and to reset to.")
    ] = "default_boot",
    emulator: Annotated[str, typer.Option(help="Path of the emulator program.")] = "emulator",
    memory: Annotated[int, typer.Option(min=256, help="Memory of each emulator, MB.")] = 2048,
    cores: Annotated[int, typer.Option(min=1, help="Cores each emulator shows its guest.")] = 2,
    adb_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the node's adb server.")] = 5037,
    boot_deadline: Annotated[float, typer.Option(min=1.0, help="Deadline for an emulator to boot, seconds.")] = 300.0,
    fleet: Fleet = "default",
    wait: Annotated[bool, typer.Option(help="Wait until every emulator has booted, or has failed to.")] = True,
) -> None:
    """Start this node's emulators and leave them running, watched by an agent."""
    from cluster.fleet.agent import AgentOptions
    from cluster.fleet.capacity import emulator_count, measure
    from cluster.fleet.emulator import EmulatorOptions
    from envs.android.adb_server import AdbServer
    from envs.android.device import DeviceError

    program = shutil.which(emulator)
    if program is None:
        raise CosoError(
            f"there is no emulator {emulator!r}: install Android's SDK emulator, or give --emulator its path"
        )
    try:
        AdbServer(port=adb_port).query("host:version", _CALL_DEADLINE_S)
    except DeviceError as error:
        raise CosoError(str(error)) from None
    if running_emulators(fleet) is not None:
        raise CosoError(f"the fleet {fleet!r} runs already: see `coso fleet status`, or stop it with `coso fleet stop`")
    number = emulator_count(count, measure(), memory)
    folder = Path(tempfile.gettempdir()) / f"coso-fleet-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = AgentOptions(
        EmulatorOptions(avd, program, snapshot, memory, cores, adb_port),
        number,
        str(folder),
        fleet,
        boot_deadline_s=boot_deadline,
    )
    agent = _start_agent(options, folder)
    typer.echo(f"{number} emulators of {avd} are being started; logs: {folder}")
    if wait:
        _wait_for_boot(fleet, agent, boot_deadline)
    _print_status(_status(fleet))
    typer.echo(f"offer them to a Ray cluster with: ray start ... --resources='{{\"emulator\": {number}}}'")


@fleet_app.command()
def status(
    fleet: Fleet = "default", as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show every emulator of this node: its state, serial, restarts and what ailed it last."""
    shown = _status(fleet)
    if as_json:
        typer.echo(json.dumps(shown, indent=1))
    else:
        _print_status(shown)


@fleet_app.command()
def stop(fleet: Fleet = "default") -> None:
    """End this node's agent, and with it its emulators."""
    from envs.android.device import DeviceError

    connection = _connect(fleet)
    try:
        pid = connection.call("status", _CALL_DEADLINE_S)["pid"]
        handle = os.pidfd_open(pid)
        connection.call("stop", _CALL_DEADLINE_S)
    except (DeviceError, ProcessLookupError) as error:
        raise CosoError(str(error)) from None
    finally:
        connection.close()
    import select

    if not select.select([handle], [], [], _STOP_DEADLINE_S)[0]:
        raise CosoError(f"the fleet's agent (process {pid}) has not ended after {_STOP_DEADLINE_S:g} s")
    os.close(handle)
    typer.echo(f"the fleet {fleet!r} has ended")


def running_emulators(fleet: str = "default") -> int | None:
    """Emulators that this node's agent runs; None where there is no agent."""
    try:
        return len(_status(fleet)["emulators"])
    except CosoError:
        return None


def _start_agent(options: Any, folder: Path) -> subprocess.Popen[bytes]:
    """The agent's process, once it answers."""
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
        if agent.poll() is not None or time.monotonic() > ends:
            agent.kill()
            raise CosoError(f"the fleet's agent did not answer within {_AGENT_DEADLINE_S:g} s: see {log}")
        time.sleep(0.05)
    return agent


def _wait_for_boot(fleet: str, agent: subprocess.Popen[bytes], deadline_s: float) -> None:
    ends = time.monotonic() + deadline_s + _AGENT_DEADLINE_S
    while time.monotonic() < ends:
        emulators = _status(fleet)["emulators"]
        if all(each["state"] in ("ready", "lent", "quarantined") or each["trouble"] for each in emulators):
            return
        if agent.poll() is not None:
            raise CosoError("the fleet's agent ended while its emulators were booting; see its log")
        time.sleep(0.2)
    raise CosoError(f"not every emulator had booted after {deadline_s:g} s; see `coso fleet status`")


def _connect(fleet: str) -> FleetConnection:
    from envs.android.device import DeviceError
    from envs.android.fleet import FleetConnection

    try:
        return FleetConnection(fleet)
    except DeviceError as error:
        raise CosoError(str(error)) from None


def _status(fleet: str) -> dict[str, Any]:
    from envs.android.device import DeviceError

    connection = _connect(fleet)
    try:
        return connection.call("status", _CALL_DEADLINE_S)
    except DeviceError as error:
        raise CosoError(str(error)) from None
    finally:
        connection.close()


def _print_status(shown: dict[str, Any]) -> None:
    table = Table(title=f"fleet {shown['fleet']} (agent: process {shown['pid']})")
    for column in ("emulator", "state", "serial", "process", "restarts", "last trouble"):
        table.add_column(column)
    for each in shown["emulators"]:
        table.add_row(
            str(each["number"]),
            each["state"],
            each["serial"] or "",
            str(each["pid"] or ""),
            str(each["restarts"]),
            each["trouble"],
        )
    Console().print(table)
