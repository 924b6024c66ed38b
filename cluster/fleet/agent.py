"""The agent of a node: keeps the node's emulators running and lends them, one to each connection.

Run as `python -m cluster.fleet.agent OPTIONS.json`. An emulator boots from its snapshot and is probed every `health_s`.
The agent restarts it when it exits, does not boot in time or fails two probes in a row. The wait before a restart
doubles with each failure; after `quarantine_after` failures in a row it is `quarantine_s`. A returned emulator is reset
to its snapshot before it is lent again. The kernel kills all emulators when this process ends.

The agent listens on an abstract socket of its user. Requests and answers are JSON, one per line: `{"call": "status"}`,
`{"call": "stop"}`, `{"call": "lease", "wait_s": 60}` and `{"call": "reset"}`. A lease lasts as long as its connection.
An answer holds either `error` or the result.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actors.rollouts.environment_restarts import RestartSchedule
from cluster.fleet.emulator import (
    EmulatorError,
    EmulatorOptions,
    EmulatorProcess,
    PortLease,
    lease_port,
    load_snapshot,
)
from envs.android.adb_server import AdbServer
from envs.android.device import DeviceError
from envs.android.fleet_client import socket_name
from envs.android.loopback import is_of_this_user

logger = logging.getLogger(__name__)

State = Literal["waiting", "booting", "ready", "lent", "resetting", "quarantined", "stopped"]
_FAILED_PROBES = 2
_BOOT_POLL_S = 0.5


@dataclass(frozen=True)
class AgentOptions:
    """What an agent runs. Times are in seconds."""

    emulator: EmulatorOptions
    count: int
    folder: str  # for logs and port locks
    fleet: str = "default"
    boot_deadline_s: float = 300.0
    reset_deadline_s: float = 60.0
    probe_deadline_s: float = 10.0
    health_s: float = 10.0
    # When an emulator that failed is started again: see `RestartSchedule`.
    restart_backoff_s: float = 2.0
    restart_backoff_max_s: float = 60.0
    quarantine_after: int = 5
    quarantine_s: float = 600.0


class Slot:
    """One emulator, over all its restarts."""

    def __init__(self, number: int, options: AgentOptions, changed: asyncio.Condition) -> None:
        self.number = number
        self.state: State = "waiting"
        self.restarts = -1
        self.trouble = ""
        #: Number of leases so far. It identifies the present borrower: a restart invalidates the previous lease.
        self.lease = 0
        self.port: PortLease | None = None
        self.process: EmulatorProcess | None = None
        self._options = options
        self._adb = AdbServer(port=options.emulator.adb_port)
        self._changed = changed
        self._schedule = RestartSchedule(options)
        self._broken = asyncio.Event()

    def status(self) -> dict[str, Any]:
        """For `coso fleet status`."""
        return {
            "number": self.number,
            "state": self.state,
            "serial": self.port.serial if self.port else None,
            "pid": self.process.pid if self.process else None,
            "restarts": max(self.restarts, 0),
            "trouble": self.trouble,
        }

    async def run(self) -> None:
        """Keep the emulator running until cancelled."""
        try:
            while True:
                await self._set("quarantined" if self._schedule.quarantined else "waiting")
                await asyncio.sleep(self._schedule.wait_s())
                try:
                    await self._boot()
                    await self._watch()
                except (EmulatorError, DeviceError) as error:
                    self.trouble = str(error)
                    wait_s = self._schedule.failed()
                    logger.warning("emulator %d: %s; restarting in %.1f s", self.number, error, wait_s)
                finally:
                    await self._end()
        finally:
            self.state = "stopped"

    async def reset(self) -> None:
        """Reset the emulator to its snapshot. If that fails, restart the emulator and raise EmulatorError."""
        assert self.port is not None
        try:
            options = self._options
            await load_snapshot(self.port.port, options.emulator.snapshot, options.reset_deadline_s)
            await self._until_booted(options.reset_deadline_s)
        except EmulatorError as error:
            self.give_up(str(error))
            raise

    def is_lent_as(self, lease: int) -> bool:
        """Whether this lease is still valid: the emulator has not been restarted since."""
        return self.state == "lent" and self.lease == lease

    async def give_back(self, lease: int) -> None:
        """Reset the emulator after a lease and offer it again."""
        if not self.is_lent_as(lease):
            return
        await self._set("resetting")
        with contextlib.suppress(EmulatorError):
            await self.reset()
            self._schedule.succeeded()
            await self._set("ready")

    def give_up(self, trouble: str) -> None:
        """Restart the emulator."""
        self.trouble = trouble
        self._broken.set()

    async def _boot(self) -> None:
        await self._set("booting")
        self._broken.clear()
        self.restarts += 1
        folder = Path(self._options.folder)
        self.port = lease_port(folder / "ports")
        log = folder / f"emulator-{self.number}.log"
        self.process = EmulatorProcess(self._options.emulator, self.port.port, log)
        try:
            await self._until_booted(self._options.boot_deadline_s)
        except EmulatorError as error:
            raise EmulatorError(f"{error}; see {log}") from None
        self.trouble = ""
        await self._set("ready")

    async def _until_booted(self, deadline_s: float) -> None:
        ends = time.monotonic() + deadline_s
        last = "no answer yet"
        while time.monotonic() < ends:
            assert self.process is not None and self.port is not None
            if self.process.exit_code is not None:
                raise EmulatorError(f"{self.port.serial} exited with code {self.process.exit_code}")
            try:
                await self._probe()
                return
            except DeviceError as error:
                last = str(error)
            await asyncio.sleep(_BOOT_POLL_S)
        raise EmulatorError(f"{self.port.serial if self.port else '?'} did not boot within {deadline_s:g} s: {last}")

    async def _probe(self) -> None:
        assert self.port is not None
        command = (self.port.serial, "getprop sys.boot_completed", self._options.probe_deadline_s)
        if (await asyncio.to_thread(self._adb.shell, *command)).strip() != b"1":
            raise DeviceError(f"{self.port.serial} has not finished booting")

    async def _watch(self) -> None:
        """Watch until the emulator fails; then raise. Never returns."""
        assert self.process is not None and self.port is not None
        failed = 0
        next_probe = time.monotonic() + self._options.health_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(0.5, self._options.health_s)):
                    await self._broken.wait()
            if self._broken.is_set():
                raise EmulatorError(self.trouble)
            if self.process.exit_code is not None:
                raise EmulatorError(f"{self.port.serial} exited with code {self.process.exit_code}")
            if time.monotonic() >= next_probe and self.state != "resetting":
                try:
                    await self._probe()
                    failed = 0
                except DeviceError as error:
                    failed += 1
                    if failed >= _FAILED_PROBES:
                        raise EmulatorError(f"{failed} probes in a row failed: {error}") from error
                next_probe = time.monotonic() + self._options.health_s

    async def _end(self) -> None:
        if self.process is not None:
            await self.process.end()
            self.process = None
        if self.port is not None:
            self.port.release()
            self.port = None

    async def _set(self, state: State) -> None:
        async with self._changed:
            self.state = state
            self._changed.notify_all()

    def lend(self) -> int:
        """Mark the emulator as lent; returns the lease number. The caller must hold the condition."""
        self.state = "lent"
        self.lease += 1
        return self.lease


class Agent:
    """All emulators of a node and their leases."""

    def __init__(self, options: AgentOptions) -> None:
        self._options = options
        self._changed = asyncio.Condition()
        self._slots = [Slot(number, options, self._changed) for number in range(options.count)]
        self._stop = asyncio.Event()
        self._givings: set[asyncio.Task[None]] = set()

    async def run(self, listener: socket.socket) -> None:
        """Serve requests on `listener` until a stop request or signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        server = await asyncio.start_unix_server(self._serve, sock=listener)
        tasks = [asyncio.create_task(slot.run()) for slot in self._slots]
        stop = asyncio.create_task(self._stop.wait())
        try:
            # A slot's task ends with an error only on a bug in the agent.
            await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*tasks, *self._givings, stop):
                task.cancel()
            results = await asyncio.gather(*tasks, *self._givings, return_exceptions=True)
            server.close()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        allowed = is_of_this_user(writer.get_extra_info("socket"))
        held: tuple[Slot, int] | None = None
        try:
            while allowed and (line := await reader.readline()):
                try:
                    held, answer = await self._handle(json.loads(line), held)
                except (EmulatorError, ValueError, KeyError, TypeError) as error:
                    answer = {"error": f"{error}"}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, asyncio.LimitOverrunError, ValueError):
            pass
        finally:
            writer.close()
            if held is not None:
                task = asyncio.create_task(held[0].give_back(held[1]))
                self._givings.add(task)
                task.add_done_callback(self._givings.discard)

    async def _handle(
        self, request: dict[str, Any], held: tuple[Slot, int] | None
    ) -> tuple[tuple[Slot, int] | None, dict[str, Any]]:
        """Handle a request; returns the lease held after it, and the answer."""
        call = request["call"]
        if call == "status":
            slots = [slot.status() for slot in self._slots]
            return held, {"fleet": self._options.fleet, "pid": os.getpid(), "emulators": slots}
        if call == "stop":
            self._stop.set()
            return held, {"stopping": True}
        if call == "lease":
            if held is not None:
                raise ValueError("this connection already has an emulator")
            slot, lease = await self._lease(float(request["wait_s"]))
            assert slot.port is not None
            return (slot, lease), {"serial": slot.port.serial, "adb_port": self._options.emulator.adb_port}
        if call == "reset":
            if held is None or not held[0].is_lent_as(held[1]):
                raise EmulatorError("the lent emulator was restarted; request another lease")
            await held[0].reset()
            return held, {"reset": True}
        raise ValueError(f"unknown call {call!r}")

    async def _lease(self, deadline_s: float) -> tuple[Slot, int]:
        try:
            async with asyncio.timeout(deadline_s), self._changed:
                while True:
                    for slot in self._slots:
                        if slot.state == "ready":
                            return slot, slot.lend()
                    await self._changed.wait()
        except TimeoutError:
            states = ", ".join(f"{slot.number} {slot.state}" for slot in self._slots)
            raise EmulatorError(f"no emulator became free within {deadline_s:g} s ({states})") from None


def listen(fleet: str) -> socket.socket:
    """Bind the fleet's socket. Raises OSError if another agent holds it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(socket_name(fleet))
    return listener


def read_options(text: str) -> AgentOptions:
    """Parse the JSON that `cluster.fleet.node` writes: the fields of AgentOptions."""
    values = json.loads(text)
    values["emulator"] = EmulatorOptions(**values["emulator"])
    return AgentOptions(**values)


def main() -> None:
    """Run the agent with the options file given on the command line."""
    options = read_options(Path(sys.argv[1]).read_text("utf-8"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        listener = listen(options.fleet)
    except OSError:
        sys.exit(f"the fleet {options.fleet!r} already has an agent on this node")
    asyncio.run(Agent(options).run(listener))


if __name__ == "__main__":
    main()
