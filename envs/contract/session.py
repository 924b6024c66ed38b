"""Runs checks in a child process, which is replaced when it ends or takes too long, and returns their results."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Literal

from envs.contract.driver_checks import DRIVER_CHECKS
from envs.contract.environment_checks import ENVIRONMENT_CHECKS
from envs.contract.result import Result

#: Longest output of a child that a message quotes, characters.
_QUOTED = 600


@dataclass(frozen=True)
class Subject:
    """What is tested: an environment's gymnasium id, or a driver (a name or `module:Class`), with its keyword
    arguments. Times are in seconds: `check_s` bounds one check, the others are as in `Environment`."""

    kind: Literal["environment", "driver"]
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    utterances: Sequence[str] = ()
    deadline_s: float = 30.0
    play_s: float = 10.0
    check_s: float = 120.0


class Session:
    """The child process for one subject. Not thread-safe."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._output: IO[bytes] | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, check: str) -> Result:
        """The result of one check."""
        answer = self.ask({"check": check}, check)
        return Result(check, answer["ok"], answer["message"], answer["measured"], answer["seconds"])

    def ask(self, request: dict[str, Any], what: str) -> dict[str, Any]:
        """The child's answer; if it gives none, an answer that says so."""
        begun = time.monotonic()
        try:
            if self._process is None:
                self._start()
            assert self._socket is not None
            self._socket.sendall((json.dumps(request) + "\n").encode())
            line = self._line(begun + self.subject.check_s)
        except TimeoutError:
            message = f"it did not come to an end in {self.subject.check_s:g} s; {self._where()}"
        except OSError:
            message = f"its process {self._ending()} during {what}; a run would lose the episode each time"
        else:
            return json.loads(line)  # type: ignore[no-any-return]
        self.close()
        return {"ok": False, "message": message, "measured": {}, "seconds": time.monotonic() - begun}

    def close(self) -> None:
        """End the child and what it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for each in (self._socket, self._output):
            if each is not None:
                each.close()
        self._process = self._socket = self._output = None

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed by close
        module_path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        # Another order of sets than here, so that what depends on it shows.
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "envs.contract.worker", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": module_path, "PYTHONHASHSEED": seed},
                start_new_session=True,
            )
        self._socket.sendall((json.dumps(asdict(self.subject)) + "\n").encode())

    def _line(self, ends: float) -> bytes:
        assert self._socket is not None
        received = bytearray()
        while not received.endswith(b"\n"):
            self._socket.settimeout(max(0.001, ends - time.monotonic()))
            part = self._socket.recv(1 << 16)
            if not part:
                raise ConnectionResetError
            received += part
        return bytes(received)

    def _ending(self) -> str:
        """How the child ended, and what it said last."""
        assert self._process is not None
        try:
            code = self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            return "closed the files that it did not open"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said = self._said()
        return f"{how} (its last output: {said!r})" if said else how

    def _where(self) -> str:
        """Where the child is now."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        ends = time.monotonic() + 2.0
        while time.monotonic() < ends:
            frames = re.findall(r'File "(.+)", line (\d+) in (\S+)', self._said(5000).rpartition("Current thread")[2])
            if frames:
                return "it is in " + ", called from ".join(f"{name} ({file}:{line})" for file, line, name in frames[:3])
            time.sleep(0.05)
        return "it does not say where it is"

    def _said(self, count: int = _QUOTED) -> str:
        assert self._output is not None
        descriptor = self._output.fileno()
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, count, max(0, size - count)).decode("utf-8", "replace").strip()


def check_environment(
    env_id: str,
    kwargs: dict[str, Any] | None = None,
    *,
    utterances: Sequence[str] = (),
    skip: Sequence[str] = (),
    report: Callable[[Result], None] = lambda result: None,
    deadline_s: float = 30.0,
    play_s: float = 10.0,
    check_s: float = 120.0,
) -> list[Result]:
    """The results of all checks of an environment, in order; the first alone if it cannot be made.

    env_id: gymnasium id, `module:Name-v0` imports `module` first; kwargs: of the environment, plain values; utterances:
    valid ones, for an environment without an expert; skip: names of checks; report: called with each result as it
    comes; deadline_s: of one reset or step in a run; play_s: how long a check may play; check_s: of one check; seconds.
    """
    subject = Subject("environment", env_id, kwargs or {}, list(utterances), deadline_s, play_s, check_s)
    return _results(subject, list(ENVIRONMENT_CHECKS), skip, report)


def check_driver(
    driver: str,
    options: dict[str, Any] | None = None,
    *,
    skip: Sequence[str] = (),
    report: Callable[[Result], None] = lambda result: None,
    deadline_s: float = 30.0,
    play_s: float = 10.0,
    check_s: float = 120.0,
) -> list[Result]:
    """The results of all checks of a driver of phones: a name of `envs.android.drivers`, or `module:Class`.

    options: its keyword arguments, plain values; the rest as for `check_environment`."""
    return _results(
        Subject("driver", driver, options or {}, (), deadline_s, play_s, check_s), list(DRIVER_CHECKS), skip, report
    )


def _results(
    subject: Subject, checks: Sequence[str], skip: Sequence[str], report: Callable[[Result], None]
) -> list[Result]:
    if unknown := sorted(set(skip) - set(checks)):
        raise ValueError(f"there are no checks {', '.join(unknown)} to skip; the checks are {', '.join(checks)}")
    results: list[Result] = []
    with Session(subject) as session:
        for check in checks:
            if check in skip:
                continue
            results.append(session.run(check))
            report(results[-1])
            if check == "makes" and not results[-1].ok:
                break
    return results
