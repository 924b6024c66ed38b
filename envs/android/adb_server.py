"""A client of the adb server: it uses the server's socket directly, one short connection per service, no subprocess.

Protocol: Android's `SERVICES.TXT` and `OVERVIEW.TXT` (a request is its length as four hexadecimal digits, then its
text; an answer starts with OKAY or FAIL), and `shell_protocol.h` for `shell,v2`.
"""

from __future__ import annotations

import socket
import struct
import time

from envs.android.device import DeviceError, DeviceTimeout

DEFAULT_PORT = 5037
_PACKET = struct.Struct("<BI")
_STDOUT, _STDERR, _EXIT = 1, 2, 3
_LARGEST_ANSWER = 64 << 20


class DeviceGone(DeviceError):
    """The adb server does not see the device, or sees it offline; the call had no effect."""


class AdbServer:
    """The adb server at `host:port`. Every call has a deadline in seconds and raises `DeviceError` when it fails."""

    def __init__(self, host: str = "127.0.0.1", port: int = DEFAULT_PORT) -> None:
        self._address = (host, port)

    def query(self, request: str, deadline_s: float) -> str:
        """The answer to a request to the server itself, for instance `host:devices`."""
        with _Connection(self._address, deadline_s) as link:
            link.request(request)
            return link.text()

    def connect(self, serial: str, deadline_s: float) -> None:
        """Make the server connect to a network device `host:port`. Raises DeviceGone if it cannot."""
        answer = self.query(f"host:connect:{serial}", deadline_s)
        if not answer.startswith(("connected to", "already connected")):
            raise DeviceGone(f"adb cannot connect to {serial}: {answer}")

    def states(self, deadline_s: float) -> dict[str, str]:
        """Serial -> state ("device", "offline", "unauthorized", …) of all devices of the server."""
        rows = (line.split("\t") for line in self.query("host:devices", deadline_s).splitlines())
        return {row[0]: row[1] for row in rows if len(row) == 2}

    def exec(self, serial: str, command: str, deadline_s: float) -> bytes:
        """The raw output of a command in the device's shell."""
        with _Connection(self._address, deadline_s) as link:
            link.to_device(serial)
            link.request(f"exec:{command}")
            return link.rest()

    def shell(self, serial: str, command: str, deadline_s: float) -> bytes:
        """Standard output of a command on the device. Raises DeviceError if its exit code is not 0."""
        with _Connection(self._address, deadline_s) as link:
            link.to_device(serial)
            link.request(f"shell,v2,raw:{command}")
            output: dict[int, bytearray] = {_STDOUT: bytearray(), _STDERR: bytearray()}
            while True:
                kind, size = _PACKET.unpack(link.read(_PACKET.size))
                data = link.read(size)
                if kind == _EXIT:
                    break
                if kind in output:
                    output[kind] += data
        if data != b"\0":
            said = (output[_STDERR] or output[_STDOUT]).decode("utf-8", "replace").strip()
            raise DeviceError(f"{command.split()[0]} on {serial} failed with code {data[0] if data else '?'}: {said}")
        return bytes(output[_STDOUT])


class _Connection:
    """One connection to the server, with one deadline for everything on it."""

    def __init__(self, address: tuple[str, int], deadline_s: float) -> None:
        self._where = f"the adb server at {address[0]}:{address[1]}"
        self._deadline_s = deadline_s
        self._ends = time.monotonic() + deadline_s
        self._doing = "connect"
        try:
            self._socket = socket.create_connection(address, deadline_s)
        except TimeoutError:
            raise self._late() from None
        except OSError as error:
            raise DeviceError(
                f"{self._where} does not answer ({error.strerror or error}); start it with `adb start-server`"
            ) from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def request(self, text: str) -> None:
        """Request a service. Raises DeviceError with the server's message if it refuses."""
        self._doing = text if len(text) <= 80 else text[:80] + "…"
        data = text.encode()
        if len(data) > 0xFFFF:
            raise DeviceError(f"a request to adb holds at most 65,535 bytes, not {len(data)}")
        self._socket.settimeout(self._left())
        try:
            self._socket.sendall(b"%04x" % len(data) + data)
        except TimeoutError:
            raise self._late() from None
        except OSError as error:
            raise DeviceError(f"{self._where} ended the connection during {self._doing}: {error}") from None
        status = self.read(4)
        if status != b"OKAY":
            message = self.text() if status == b"FAIL" else f"unexpected answer {status!r}"
            gone = text.startswith("host:transport:") or "device" in message and "not found" in message
            raise (DeviceGone if gone else DeviceError)(f"adb refused {self._doing}: {message}")

    def to_device(self, serial: str) -> None:
        """Switch the connection to a device."""
        self.request(f"host:transport:{serial}")

    def text(self) -> str:
        """Read a string that is preceded by its length."""
        size = self.read(4)
        try:
            return self.read(int(size, 16)).decode("utf-8", "replace")
        except ValueError:
            raise DeviceError(f"{self._where} answered {self._doing} with {size!r} for a length") from None

    def read(self, count: int) -> bytes:
        """Read exactly `count` bytes."""
        if count > _LARGEST_ANSWER:
            raise DeviceError(f"{self._where} announced {count} bytes in answer to {self._doing}")
        data = bytearray()
        while len(data) < count:
            part = self._receive(count - len(data))
            if not part:
                raise DeviceError(f"the device or {self._where} ended the connection during {self._doing}")
            data += part
        return bytes(data)

    def rest(self) -> bytes:
        """Read until the other side closes the connection."""
        parts = bytearray()
        while part := self._receive(1 << 16):
            parts += part
            if len(parts) > _LARGEST_ANSWER:
                raise DeviceError(f"{self._doing} was answered with more than {_LARGEST_ANSWER} bytes")
        return bytes(parts)

    def _receive(self, most: int) -> bytes:
        self._socket.settimeout(self._left())
        try:
            return self._socket.recv(min(most, 1 << 20))
        except TimeoutError:
            raise self._late() from None
        except OSError as error:
            raise DeviceError(f"{self._where} ended the connection during {self._doing}: {error}") from None

    def _left(self) -> float:
        left = self._ends - time.monotonic()
        if left <= 0:
            raise self._late()
        return left

    def _late(self) -> DeviceTimeout:
        return DeviceTimeout(f"{self._where} did not finish {self._doing} in {self._deadline_s:g} s")
