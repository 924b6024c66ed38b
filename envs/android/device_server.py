"""A device server for real adb with an embedded phone, to try and test the `adb` driver without an emulator.

`python -m envs.android.device_server --port 5555`, then `adb connect 127.0.0.1:5555`. It implements adb's transport
over TCP on loopback (CNXN without authentication, OPEN, OKAY, WRTE, CLSE; services `exec:`, `shell:` and `shell,v2:`)
and the commands that the driver uses: screencap, input, am broadcast of the ADB keyboard, getprop, settings,
dumpsys activity, pm clear, wm size. Chromium renders its screen; it is not Android.

Protocol: Android's `protocol.txt` and `shell_protocol.h`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import shlex
import struct
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from envs.android.adb import ADB_KEYBOARD
from envs.android.browser import BrowserPhone
from envs.android.device import InspectableDevice, Start
from envs.android.phone.content import initial_state

_HEADER = struct.Struct("<6I")
_VERSION, _LARGEST_PAYLOAD = 0x01000001, 1 << 20
_COMMANDS = {name: struct.unpack("<I", name.encode())[0] for name in ("CNXN", "OPEN", "OKAY", "WRTE", "CLSE")}
_NAMES = {code: name for name, code in _COMMANDS.items()}
_BANNER = b"device::ro.product.name=coso;ro.product.model=CosoPhone;ro.product.device=coso;features=shell_v2,cmd"
_KEYS = {
    "KEYCODE_BACK": "back",
    "KEYCODE_HOME": "home",
    "KEYCODE_ENTER": "enter",
    "4": "back",
    "3": "home",
    "66": "enter",
}
_FAILED = 255


class Shell(Protocol):
    """Executes a command line; returns (exit code, standard output). May block."""

    def __call__(self, command: str) -> tuple[int, bytes]: ...


class EmbeddedPhoneShell:
    """The Android shell commands that the driver needs, executed on an embedded phone."""

    def __init__(self, phone: InspectableDevice, seed: int = 0) -> None:
        self.phone = phone
        self._seed = seed
        self.phone.reset(Start(initial_state(seed)))

    def __call__(self, command: str) -> tuple[int, bytes]:
        try:
            words = shlex.split(command)
        except ValueError as error:
            return 2, f"/system/bin/sh: {error}\n".encode()
        match words:
            case ["screencap", *flags]:
                return 0, self.screen("-p" in flags)
            case ["input", *arguments]:
                return self._input(arguments)
            case ["am", "broadcast", "-a", "ADB_INPUT_B64", "--es", "msg", encoded]:
                self.phone.text(base64.b64decode(encoded).decode())
                return 0, b"Broadcast completed: result=0\n"
            case ["settings", "get", "secure", "default_input_method"]:
                return 0, f"{ADB_KEYBOARD}\n".encode()
            case ["settings", "get", _, key]:
                value = self.phone.inspect()["state"]["settings"].get(key)
                return 0, f"{int(value) if isinstance(value, bool) else 'null' if value is None else value}\n".encode()
            case ["dumpsys", "activity", "activities"]:
                screen = self.phone.inspect()["state"]["screen"]
                name = f"org.coso.{screen['app']}/.{screen['page'].capitalize()}"
                return 0, f"  topResumedActivity=ActivityRecord{{1f2 u0 {name} t7}}\n".encode()
            case ["pm", "list", "packages", package]:
                app = package.removeprefix("org.coso.")
                return 0, f"package:{package}\n".encode() if app in initial_state(0)["layout"] else b""
            case ["pm", "clear", _]:
                self.phone.reset(Start(initial_state(self._seed)))
                return 0, b"Success\n"
            case ["wm", "size"]:
                return 0, "Physical size: {}x{}\n".format(*self.phone.screen_size).encode()
            case ["getprop", name]:
                return 0, {"sys.boot_completed": b"1\n", "ro.product.model": b"CosoPhone\n"}.get(name, b"\n")
        return 127, f"/system/bin/sh: {words[0] if words else command}: not found\n".encode()

    def screen(self, png: bool) -> bytes:
        """The screen as PNG, or raw with the header of `screencap`."""
        pixels = self.phone.screenshot()
        height, width, _ = pixels.shape
        if png:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
            return buffer.getvalue()
        alpha = np.full((height, width, 1), 255, np.uint8)
        return struct.pack("<IIII", width, height, 1, 1) + np.concatenate([pixels, alpha], axis=2).tobytes()

    def _input(self, arguments: list[str]) -> tuple[int, bytes]:
        if arguments[:1] == ["-d"]:  # the phone has one display
            arguments = arguments[2:]
        width, height = self.phone.screen_size

        def at(x: str, y: str) -> tuple[float, float]:
            return (float(x) + 0.5) / width, (float(y) + 0.5) / height

        match arguments:
            case ["tap", x, y]:
                self.phone.tap(at(x, y))
            case ["swipe", x1, y1, x2, y2, *_]:
                self.phone.swipe(at(x1, y1), at(x2, y2))
            case ["text", text]:
                self.phone.text(text.replace("%s", " "))
            case ["keyevent", code] if code in _KEYS:
                self.phone.key(_KEYS[code])  # type: ignore[arg-type]
            case _:
                return _FAILED, f"Error: Unknown command: {arguments}\n".encode()
        return 0, b""


@dataclass
class _Stream:
    remote: int
    acknowledged: asyncio.Event = field(default_factory=asyncio.Event)


class DeviceServer:
    """Serves one device on loopback; `shell` runs in its own thread, one command at a time."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._worker = ThreadPoolExecutor(1)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, port: int = 0) -> int:
        """Start listening; returns the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        return self._server.sockets[0].getsockname()[1]

    def hang_up(self) -> None:
        """Close all connections, as if the device had left the network."""
        for writer in self._writers:
            writer.transport.abort()

    async def stop(self) -> None:
        """Stop the server."""
        if self._server is not None:
            self._server.close()
        self.hang_up()
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await _Transport(reader, writer, self._run).serve()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _run(self, command: str) -> tuple[int, bytes]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._shell, command)
        except Exception as error:
            return _FAILED, f"{type(error).__name__}: {error}\n".encode()


class _Transport:
    """One connection from an adb server, with its open streams."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        run: Callable[[str], Awaitable[tuple[int, bytes]]],
    ) -> None:
        self._reader, self._writer, self._run = reader, writer, run
        self._streams: dict[int, _Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next = 1
        self._largest = 4096
        self._checksums = True

    async def serve(self) -> None:
        try:
            while True:
                header = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
                code, first, second, size, _, magic = header
                if magic != code ^ 0xFFFFFFFF or size > _LARGEST_PAYLOAD:
                    return
                data = await self._reader.readexactly(size)
                await self._handle(_NAMES.get(code, ""), first, second, data)
        finally:
            for task in self._tasks:
                task.cancel()

    async def _handle(self, name: str, first: int, second: int, data: bytes) -> None:
        if name == "CNXN":
            self._checksums = first < _VERSION
            self._largest = min(second, _LARGEST_PAYLOAD)
            await self._send("CNXN", _VERSION, _LARGEST_PAYLOAD, _BANNER)
        elif name == "OPEN":
            local, self._next = self._next, self._next + 1
            self._streams[local] = _Stream(first)
            await self._send("OKAY", local, first)
            task = asyncio.create_task(self._serve_stream(local, data.rstrip(b"\0").decode("utf-8", "replace")))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif name == "OKAY" and second in self._streams:
            self._streams[second].acknowledged.set()
        elif name == "WRTE" and second in self._streams:
            await self._send("OKAY", second, first)
        elif name == "CLSE" and (stream := self._streams.pop(second, None)):
            stream.acknowledged.set()
            await self._send("CLSE", second, first)

    async def _serve_stream(self, local: int, service: str) -> None:
        kind, _, command = service.partition(":")
        if kind.partition(",")[0] not in ("shell", "exec"):
            await self._send("CLSE", 0, self._streams.pop(local).remote)
            return
        code, output = await self._run(command)
        if kind.startswith("shell") and ",v2" in kind:
            packets = struct.pack("<BI", 1, len(output)) + output if output else b""
            output = packets + struct.pack("<BIB", 3, 1, code)
        for start in range(0, len(output), self._largest):
            stream = self._streams.get(local)
            if stream is None:
                return
            stream.acknowledged.clear()
            await self._send("WRTE", local, stream.remote, output[start : start + self._largest])
            await stream.acknowledged.wait()
        if (finished := self._streams.pop(local, None)) is not None:
            await self._send("CLSE", local, finished.remote)

    async def _send(self, name: str, first: int, second: int, data: bytes = b"") -> None:
        code = _COMMANDS[name]
        checksum = sum(data) & 0xFFFFFFFF if self._checksums else 0
        self._writer.write(_HEADER.pack(code, first, second, len(data), checksum, code ^ 0xFFFFFFFF) + data)
        await self._writer.drain()


async def _main(port: int, seed: int) -> None:
    phone = BrowserPhone()
    server = DeviceServer(EmbeddedPhoneShell(phone, seed))
    try:
        print(f"adb connect 127.0.0.1:{await server.start(port)}    (Ctrl-C stops it)", flush=True)
        await asyncio.Event().wait()
    finally:
        await server.stop()
        phone.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An embedded phone as a device for real adb, on loopback.")
    parser.add_argument("--port", type=int, default=5555, help="port on loopback; 0 takes a free one")
    parser.add_argument("--seed", type=int, default=0, help="seed of the phone's content")
    chosen = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(chosen.port, chosen.seed))
