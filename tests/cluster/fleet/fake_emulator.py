#!/usr/bin/env python
"""Stands in for Android's emulator, which needs KVM: the only part of the fleet that its tests do not run for real.

It takes the emulator's command line, opens its console port, speaks adb on the next one, and announces itself to the
adb server as the emulator does. `fake-ANYTHING` as the AVD boots at once; files in the folder $COSO_FAKE_EMULATOR make
the next one `refuse` (exit at once), and every one `hang` (answer nothing).
"""

import argparse
import asyncio
import os
import struct
from pathlib import Path

from envs.android.device_server import DeviceServer

parser = argparse.ArgumentParser()
for name in ("-avd", "-snapshot", "-memory", "-cores", "-gpu"):
    parser.add_argument(name, required=True)
parser.add_argument("-port", type=int, required=True)
for name in ("-read-only", "-no-snapshot-save", "-no-window", "-no-audio", "-no-boot-anim"):
    parser.add_argument(name, action="store_true", required=True)


class Guest:
    """A device whose whole state is how often it was tapped; a snapshot knows nothing of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taps = 0

    def __call__(self, command: str) -> tuple[int, bytes]:
        if (self.folder / "hang").exists():
            return 0, b"\n"
        if command == "screencap -p":
            raise NotImplementedError
        if command == "screencap":
            return 0, struct.pack("<IIII", 4, 6, 1, 1) + bytes([self.taps, 0, 0, 255]) * 24
        if command.startswith("input tap"):
            self.taps += 1
        return 0, b"1\n" if command.startswith("getprop sys.boot") else b"\n"


async def main() -> None:
    options = parser.parse_args()
    folder = Path(os.environ["COSO_FAKE_EMULATOR"])
    if (folder / "refuse").exists():
        raise SystemExit("emulator: there is no such AVD")
    guest = Guest(folder)

    async def console(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"Android Console: type 'help' for a list of commands\r\nOK\r\n")
        while line := (await reader.readline()).decode().strip():
            if line == f"avd snapshot load {options.snapshot}":
                guest.taps = 0
                writer.write(b"OK\r\n")
            else:
                writer.write(b"OK\r\n" if line.startswith("auth") else b"KO: no such snapshot\r\n")
        writer.close()

    await asyncio.start_server(console, "127.0.0.1", options.port)
    await DeviceServer(guest).start(options.port + 1)
    announcement = f"host:emulator:{options.port + 1}"
    _, adb = await asyncio.open_connection("127.0.0.1", int(os.environ["ANDROID_ADB_SERVER_PORT"]))
    adb.write(f"{len(announcement):04x}{announcement}".encode())
    await adb.drain()
    adb.close()
    await asyncio.Event().wait()


asyncio.run(main())
