"""The `emulator` driver: a phone from the node's fleet of emulators (`coso fleet start`)."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from envs.android.adb import AdbPhone
from envs.android.device import DeviceError, DeviceTimeout, Start
from envs.android.loopback import is_of_this_user

_LONGEST_ANSWER = 1 << 20


def socket_name(fleet: str) -> str:
    """The abstract socket of the agent of a user's fleet; it disappears with the agent."""
    return f"\0coso-fleet-{os.getuid()}-{fleet}"


class FleetConnection:
    """A connection to the node's agent. An emulator leased over it is returned when it closes."""

    def __init__(self, fleet: str = "default") -> None:
        """Raises DeviceError that says what to do if no agent runs."""
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._link.connect(socket_name(fleet))
        except OSError:
            self._link.close()
            raise DeviceError(
                f"no agent of the fleet {fleet!r} runs on this node; start one with `coso fleet start`"
            ) from None
        if not is_of_this_user(self._link):
            self._link.close()
            raise DeviceError(f"the agent of the fleet {fleet!r} on this node is not a process of this user")

    def call(self, name: str, deadline_s: float, **arguments: Any) -> dict[str, Any]:
        """Call the agent and return its answer. Raises DeviceError if it refuses, DeviceTimeout if it is late."""
        ends = time.monotonic() + deadline_s
        answer = bytearray()
        try:
            self._link.settimeout(deadline_s)
            self._link.sendall(json.dumps({"call": name, **arguments}).encode() + b"\n")
            while not answer.endswith(b"\n"):
                self._link.settimeout(max(ends - time.monotonic(), 0.001))
                part = self._link.recv(1 << 16)
                if not part or len(answer) > _LONGEST_ANSWER:
                    raise DeviceError(f"the fleet's agent closed the connection during {name}")
                answer += part
        except TimeoutError:
            raise DeviceTimeout(f"the fleet's agent did not answer {name} within {deadline_s:g} s") from None
        except OSError as error:
            raise DeviceError(f"the connection to the fleet's agent ended during {name}: {error}") from None
        result: dict[str, Any] = json.loads(answer)
        if "error" in result:
            raise DeviceError(f"the fleet: {result['error']}")
        return result

    def close(self) -> None:
        """Close the connection and return the emulator."""
        self._link.close()


class FleetPhone(AdbPhone):
    """An emulator of the node's fleet, leased until `close`."""

    def __init__(
        self, fleet: str = "default", lease_deadline_s: float = 60.0, reset_deadline_s: float = 60.0, **options: Any
    ) -> None:
        """fleet: its name; lease_deadline_s: longest wait for a free emulator, seconds; reset_deadline_s: longest wait
        for a reset to the snapshot, seconds; options: as for `AdbPhone`. Raises DeviceError or DeviceTimeout."""
        self._fleet = FleetConnection(fleet)
        self._reset_deadline_s = reset_deadline_s
        try:
            lent = self._fleet.call("lease", lease_deadline_s + 5.0, wait_s=lease_deadline_s)
            super().__init__(lent["serial"], server_port=lent["adb_port"], **options)
        except BaseException:
            self._fleet.close()
            raise

    def reset(self, start: Start) -> None:
        """Reset to the snapshot, then reset as `AdbPhone` does."""
        self._fleet.call("reset", self._reset_deadline_s + 5.0)
        super().reset(start)

    def close(self) -> None:
        self._fleet.close()
