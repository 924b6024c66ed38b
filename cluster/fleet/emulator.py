"""One Android emulator: its command line, its ports, its process and its console."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from envs.parent import end_with_parent

#: Console ports; adb's is the next one. The emulator takes even ports in this range only.
CONSOLE_PORTS = range(5554, 5683, 2)
#: The file with the emulator's console token; the emulator writes it.
CONSOLE_TOKEN = Path.home() / ".emulator_console_auth_token"


class EmulatorError(Exception):
    """An emulator or its console failed. The message says which one and how."""


@dataclass(frozen=True)
class EmulatorOptions:
    """How emulators are started. `avd` is the template: every instance boots from its `snapshot` and writes to its own
    copy (`-read-only`, copy-on-write), so any number of instances share one image."""

    avd: str
    program: str = "emulator"
    snapshot: str = "default_boot"
    memory_mb: int = 2048
    cores: int = 2
    adb_port: int = 5037

    def command(self, console_port: int) -> list[str]:
        """The emulator's command line, for a machine without a display."""
        return [
            self.program, "-avd", self.avd, "-read-only", "-port", str(console_port),
            "-snapshot", self.snapshot, "-no-snapshot-save", "-memory", str(self.memory_mb), "-cores", str(self.cores),
            "-no-window", "-no-audio", "-no-boot-anim", "-gpu", "swiftshader_indirect",
        ]  # fmt: skip


class PortLease:
    """A console port and the adb port after it, reserved on this machine until released."""

    def __init__(self, port: int, lock: IO[bytes]) -> None:
        self.port = port
        self._lock = lock

    @property
    def serial(self) -> str:
        """The emulator's name in adb."""
        return f"emulator-{self.port}"

    def release(self) -> None:
        """Release the ports."""
        self._lock.close()


def lease_port(folder: Path, ports: range = CONSOLE_PORTS) -> PortLease:
    """Reserve the first pair of ports that no other agent holds and no program listens on.

    folder: for lock files, the same for all agents of a machine; the kernel releases a lock when its holder ends.
    Raises EmulatorError if no pair is free.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for port in ports:
        lock = (folder / f"{port}.lock").open("ab")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if all(_is_free(each) for each in (port, port + 1)):
                return PortLease(port, lock)
        lock.close()
    raise EmulatorError(f"no console port from {ports.start} to {ports.stop - 1} is free on this machine")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Accept a port whose last connection has just ended, as the emulator itself does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class EmulatorProcess:
    """A running emulator. The kernel kills it when the process that started it ends, for whatever reason."""

    def __init__(self, options: EmulatorOptions, port: int, log: Path) -> None:
        """Start it; its output goes to `log`. Raises EmulatorError if the program cannot be started."""
        environment = {**os.environ, "ANDROID_ADB_SERVER_PORT": str(options.adb_port)}
        with log.open("ab") as output:
            try:
                self._process = subprocess.Popen(
                    options.command(port),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=partial(end_with_parent, os.getpid()),
                )
            except OSError as error:
                raise EmulatorError(f"{options.program} cannot be started: {error.strerror or error}") from None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code (minus the signal number after a signal), or None while it runs."""
        if self._process.returncode is not None:
            return self._process.returncode
        # WNOWAIT leaves the process unreaped, so its pid and process group cannot be reused.
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    async def end(self, grace_s: float = 5.0) -> None:
        """Send SIGTERM, and SIGKILL after `grace_s` seconds, to it and all processes of its session."""
        if self._process.returncode is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            ends = asyncio.get_running_loop().time() + grace_s
            while self.exit_code is None and asyncio.get_running_loop().time() < ends:
                await asyncio.sleep(0.05)
        self._process.poll()


async def load_snapshot(console_port: int, name: str, deadline_s: float, token_file: Path = CONSOLE_TOKEN) -> None:
    """Load a snapshot through the emulator's console. Raises EmulatorError if that fails."""
    where = f"the console of emulator-{console_port}"
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", console_port)
            try:
                await _answer(reader, where)
                if token_file.exists():
                    await _say(writer, f"auth {token_file.read_text().strip()}")
                    await _answer(reader, where)
                await _say(writer, f"avd snapshot load {name}")
                await _answer(reader, where)
            finally:
                writer.close()
    except TimeoutError:
        raise EmulatorError(f"{where} did not load the snapshot {name} within {deadline_s:g} s") from None
    except OSError as error:
        raise EmulatorError(f"{where} does not answer: {error.strerror or error}") from None


async def _say(writer: asyncio.StreamWriter, line: str) -> None:
    writer.write(line.encode() + b"\r\n")
    await writer.drain()


async def _answer(reader: asyncio.StreamReader, where: str) -> None:
    """Read until the line that ends an answer. Raises EmulatorError if the console refuses."""
    while line := (await reader.readline()).decode("utf-8", "replace").strip():
        if line == "OK":
            return
        if line.startswith("KO"):
            raise EmulatorError(f"{where} refuses: {line}")
    raise EmulatorError(f"{where} closed the connection")
