"""`coso fleet`: start, watch and stop the emulators of this node."""

from __future__ import annotations

import json
import shutil
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.errors import CosoError
from cluster.fleet.emulator import EmulatorOptions

fleet_app = typer.Typer(help="Start, watch and stop the Android emulators of this node.", no_args_is_help=True)

Fleet = Annotated[str, typer.Option(help="Name of the fleet, if a node runs several.")]


@fleet_app.command()
def start(
    avd: Annotated[
        str, typer.Option(help="Android virtual device that serves as the template (`avdmanager list avd`).")
    ],
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Number of emulators; default: as many as this node's cores and memory allow."),
    ] = None,
    snapshot: Annotated[
        str, typer.Option(help="Snapshot of the template; emulators boot from it and reset to it.")
    ] = EmulatorOptions.snapshot,
    emulator: Annotated[str, typer.Option(help="Path of the emulator program.")] = EmulatorOptions.program,
    memory: Annotated[int, typer.Option(min=256, help="Memory of each emulator, MB.")] = EmulatorOptions.memory_mb,
    cores: Annotated[int, typer.Option(min=1, help="Virtual cores of each emulator.")] = EmulatorOptions.cores,
    adb_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the node's adb server.")
    ] = EmulatorOptions.adb_port,
    boot_deadline: Annotated[float, typer.Option(min=1.0, help="Deadline for an emulator to boot, seconds.")] = 300.0,
    fleet: Fleet = "default",
    wait: Annotated[bool, typer.Option(help="Wait until every emulator has booted or failed.")] = True,
) -> None:
    """Start this node's emulators; an agent keeps them running in the background."""
    from cluster.fleet.agent import AgentOptions
    from cluster.fleet.capacity import emulator_count, measure
    from cluster.fleet.node import CALL_DEADLINE_S, agent_folder, running_emulators, start_agent, wait_for_boot
    from cluster.fleet.node import status as fleet_status
    from envs.android.adb_server import AdbServer
    from envs.android.device import DeviceError

    program = shutil.which(emulator)
    if program is None:
        raise CosoError(
            f"emulator program {emulator!r} not found: install Android's SDK emulator, or give its path with --emulator"
        )
    try:
        AdbServer(port=adb_port).query("host:version", CALL_DEADLINE_S)
    except DeviceError as error:
        raise CosoError(str(error)) from None
    if running_emulators(fleet) is not None:
        raise CosoError(
            f"the fleet {fleet!r} is already running: see `coso fleet status`, or stop it with `coso fleet stop`"
        )
    number = emulator_count(count, measure(), memory)
    folder = agent_folder()
    options = AgentOptions(
        EmulatorOptions(avd, program, snapshot, memory, cores, adb_port),
        number,
        str(folder),
        fleet,
        boot_deadline_s=boot_deadline,
    )
    agent = start_agent(options, folder)
    typer.echo(f"starting {number} emulators of {avd}; logs: {folder}")
    if wait:
        wait_for_boot(fleet, agent, boot_deadline)
    _print_status(fleet_status(fleet))
    typer.echo(f"offer them to a Ray cluster with: ray start ... --resources='{{\"emulator\": {number}}}'")


@fleet_app.command()
def status(
    fleet: Fleet = "default", as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show every emulator of this node: state, serial, restarts and last failure."""
    from cluster.fleet.node import status as fleet_status

    shown = fleet_status(fleet)
    if as_json:
        typer.echo(json.dumps(shown, indent=1))
    else:
        _print_status(shown)


@fleet_app.command()
def stop(fleet: Fleet = "default") -> None:
    """Stop this node's agent and its emulators."""
    from cluster.fleet.node import stop_agent

    stop_agent(fleet)
    typer.echo(f"the fleet {fleet!r} has stopped")


def _print_status(shown: dict[str, Any]) -> None:
    table = Table(title=f"fleet {shown['fleet']} (agent: process {shown['pid']})")
    for column in ("emulator", "state", "serial", "process", "restarts", "last failure"):
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
