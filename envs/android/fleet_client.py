"""The `emulator` driver: a phone borrowed from the node's fleet of emulators (`coso fleet start`)."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from envs.android.adb import AdbPhone
from envs.android.device import DeviceError, DeviceTimeout, Start

_LONGEST_ANSWER = 1 << 20


def socket_name(fleet: str) -> str:
    """Where the agent of a user's fleet listens (an abstract socket: it vanishes with the agent)."""
    return f"\0coso-fleet-{os.getuid()}-{fleet}"


class FleetConnection:
    """A connection to the node's agent; what is borrowed through it is given back when it ends."""

    def __init__(self, fleet: str = "default") -> None:
        """Raises DeviceError, saying what to do, where no agent runs."""
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._link.connect(socket_name(fleet))
        except OSError:
            self._link.close()
            raise DeviceError(
                f"no agent of the fleet {fleet!r} runs on this node; start one with `coso fleet start`"
            ) from None

    def call(self, name: str, deadline_s: float, **arguments: Any) -> dict[str, Any]:
        """The agent's answer. Raises DeviceError with what it says where it refuses, DeviceTimeout if it is late."""
        ends = time.monotonic() + deadline_s
        answer = bytearray()
        try:
            self._link.settimeout(deadline_s)
            self._link.sendall(json.dumps({"call": name, **arguments}).encode() + b"\n")
            while not answer.endswith(b"\n"):
                self._link.settimeout(max(ends - time.monotonic(), 0.001))
                part = self._link.recv(1 << 16)
                if not part or len(answer) > _LONGEST_ANSWER:
                    raise DeviceError(f"the fleet's agent ended the connection during {name}")
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
        """Give back what was borrowed."""
        self._link.close()


class FleetPhone(AdbPhone):
    """An emulator of the node's fleet, borrowed for as long as this object is open."""

    def __init__(
        self, fleet: str = "default", lease_deadline_s: float = 60.0, reset_deadline_s: float = 60.0, **options: Any
    ) -> None:
        """fleet: its name; lease_deadline_s: how long to wait for an emulator to become free; reset_deadline_s: for one
        to be wound back to its snapshot; options: as for `AdbPhone`."""
        self._fleet = FleetConnection(fleet)
        self._reset_deadline_s = reset_deadline_s
        try:
            lent = self._fleet.call("lease", lease_deadline_s + 5.0, wait_s=lease_deadline_s)
            super().__init__(lent["serial"], server_port=lent["adb_port"], **options)
        except BaseException:
            self._fleet.close()
            raise

    def reset(self, start: Start) -> None:
        """Back to the snapshot, then as `AdbPhone` does."""
        self._fleet.call("reset", self._reset_deadline_s + 5.0)
        super().reset(start)

    def close(self) -> None:
        self._fleet.close()
