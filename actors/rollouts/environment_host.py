"""One environment in one operating-system process, driven from asyncio, with a deadline on every call."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.images import RecentImages
from actors.rollouts.environment_process import LENGTH, PID, RECENT_IMAGE_BYTES, frame, with_image_bytes
from actors.rollouts.environment_restarts import RestartSchedule
from envs.labels import LabelSpace
from envs.parsing import Parser
from envs.settings import EnvironmentSettings

logger = logging.getLogger(__name__)

FailureReason = Literal["died", "timeout", "error"]

_KILL_DEADLINE_S = 10.0
_FORK_SERVER_DEADLINE_S = 10.0


class EnvironmentFailure(Exception):
    """An environment's process ended, did not answer in time, raised, or returned what the contract does not allow;
    `detail` says what and where."""

    def __init__(self, reason: FailureReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: FailureReason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"environment {self.reason}: {self.detail}"


class EnvironmentHost:
    """Starts an environment in a process of its own and calls it, one call at a time.

    A call that fails raises `EnvironmentFailure` and leaves no process behind; a cancelled call leaves none either. The
    host can then be started again: at once by `restart()`, or by `ensure_running()` when its restart schedule allows.
    All hosts of a driver process share one fork server, which forks their processes.
    """

    def __init__(self, settings: EnvironmentSettings) -> None:
        self.settings = settings
        self._schedule = RestartSchedule(settings)
        self._steps_since_reset = 0
        self._label_space: LabelSpace | None = None
        self._link: _Link | None = None
        self._busy_with: str | None = None

    @property
    def pid(self) -> int | None:
        """The environment's process, or None while none runs."""
        return self._link.pid if self._link else None

    @property
    def quarantined(self) -> bool:
        """Whether the environment has failed so often in a row that `ensure_running` would wait for long."""
        return self._schedule.quarantined

    @property
    def label_space(self) -> LabelSpace:
        """The heads of `info["action_labels"]`; known after the first start."""
        if self._label_space is None:
            raise RuntimeError(f"{self.settings.id} has not been started yet")
        return self._label_space

    async def start(self) -> None:
        """Start the process and make the environment in it."""
        if self._link is not None:
            raise RuntimeError(f"{self.settings.id} already runs, as process {self.pid}")
        settings = self.settings
        arguments = {"env_id": settings.id, "kwargs": settings.kwargs, "module_path": list(sys.path)}
        with self._only_call("start"):
            try:
                async with asyncio.timeout(settings.start_deadline_s):
                    self._link = await _connect()
            except TimeoutError:
                detail = f"no process for {settings.id} started within {settings.start_deadline_s:g} s"
                raise self._failure("timeout", detail) from None
            except OSError as error:
                raise self._failure("died", f"no process for {settings.id} could start: {error}") from error
            self._label_space = await self._call("make", arguments, settings.start_deadline_s)

    async def parser(self) -> Parser | None:
        """The parser of the environment's utterances, which works without it; None where it has none."""
        with self._only_call("parser"):
            return await self._call("parser", {}, self.settings.deadline_s)  # type: ignore[no-any-return]

    async def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`Env.reset`: (observation, info); the observation's image is an `EncodedImage`."""
        with self._only_call("reset"):
            # The episode before this one had no failure, so earlier failures no longer count.
            if self._steps_since_reset:
                self._schedule.succeeded()
                self._steps_since_reset = 0
            return await self._observe("reset", {"seed": seed, "options": options})

    async def step(self, utterance: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """`Env.step`: (observation, reward, terminated, truncated, info); the image is an `EncodedImage`."""
        with self._only_call("step"):
            result = await self._observe("step", {"action": utterance})
            self._steps_since_reset += 1
            return result

    async def ensure_running(self) -> None:
        """Start the environment if it does not run; wait first as long as its restart schedule says.

        It tries once. A start that fails is counted and raised, and the next call waits longer.
        """
        if self._link is None:
            await asyncio.sleep(self._schedule.wait_s())
            await self.start()

    async def restart(self) -> None:
        """Kill the process, if there is one, and start a new one without waiting."""
        await self._kill()
        await self.start()

    async def close(self) -> None:
        """Close the environment and end its process; kill it if that takes longer than the deadline."""
        link = self._link
        if link is None:
            return
        # A process that is busy with a call does not read a request to close.
        if self._busy_with is None:
            with contextlib.suppress(OSError, TimeoutError):
                link.writer.write(frame(("close", None)))
                await link.wait_for_end(self.settings.deadline_s)
        await self._kill()

    @contextlib.contextmanager
    def _only_call(self, method: str) -> Any:
        if self._busy_with is not None:
            raise RuntimeError(f"{self.settings.id} is busy with {self._busy_with}; {method} must wait for it")
        self._busy_with = method
        try:
            yield
        finally:
            self._busy_with = None

    async def _observe(self, method: str, arguments: dict[str, Any]) -> Any:
        """Call `reset` or `step`; a picture that came without its bytes has them from when it came first."""
        link = self._link
        observation, *rest = await self._call(method, arguments, self.settings.deadline_s)
        assert link is not None  # as `_call` has checked
        return with_image_bytes(observation, link.images), *rest

    async def _call(self, method: str, arguments: dict[str, Any], deadline_s: float) -> Any:
        link = self._link
        if link is None:
            raise RuntimeError(f"{self.settings.id} is not running: start() or restart() it before {method}")
        who = f"{self.settings.id} (process {link.pid})"
        try:
            async with asyncio.timeout(deadline_s):
                link.writer.write(frame((method, arguments)))
                await link.writer.drain()
                length = LENGTH.unpack(await link.reader.readexactly(LENGTH.size))[0]
                body = await link.reader.readexactly(length)
        except TimeoutError:
            await self._kill()
            raise self._failure("timeout", f"{who} did not answer {method} in {deadline_s:g} s") from None
        except (asyncio.IncompleteReadError, OSError):
            await self._kill()
            raise self._failure("died", f"{who} ended during {method}") from None
        except BaseException:
            # Cancelled between request and answer: the next answer read would belong to this request.
            link.kill()
            self._drop(link)
            raise
        try:
            status, value = pickle.loads(body)
        except Exception as error:
            status, value = "error", f"its answer cannot be unpickled in the driver: {error}"
        if status == "error":
            await self._kill()
            raise self._failure("error", f"{who} failed in {method}: {value}")
        return value

    def _failure(self, reason: FailureReason, detail: str) -> EnvironmentFailure:
        self._schedule.failed()
        self._steps_since_reset = 0
        return EnvironmentFailure(reason, detail)

    async def _kill(self) -> None:
        link = self._link
        if link is None:
            return
        try:
            link.kill()
            await link.wait_for_end(_KILL_DEADLINE_S)
        except TimeoutError:
            logger.error("process %d of %s still runs %g s after SIGKILL", link.pid, self.settings.id, _KILL_DEADLINE_S)
        finally:
            self._drop(link)

    def _drop(self, link: _Link) -> None:
        link.close()
        if self._link is link:
            self._link = None


@dataclass
class _Link:
    """A running environment process: its pid, its pidfd, the socket to it, and the pictures that it sent last."""

    pid: int
    pidfd: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    images: RecentImages[bytes] = field(default_factory=lambda: RecentImages(RECENT_IMAGE_BYTES))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def wait_for_end(self, deadline_s: float) -> None:
        """Return once the process has ended; TimeoutError after the deadline."""
        async with asyncio.timeout(deadline_s):
            await _readable(self.pidfd)

    def close(self) -> None:
        if self.pidfd >= 0:
            self.writer.transport.abort()
            os.close(self.pidfd)
            self.pidfd = -1


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    # A copy: a descriptor can have only one reader, and several tasks may wait for the same process.
    watched = os.dup(descriptor)
    ready = loop.create_future()
    loop.add_reader(watched, _settle, ready)
    try:
        await ready
    finally:
        loop.remove_reader(watched)
        os.close(watched)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _connect() -> _Link:
    ours, theirs = socket.socketpair()
    pidfds: list[int] = []
    try:
        with theirs:
            _fork_server_of_this_process().fork(theirs)
        ours.setblocking(False)
        await _readable(ours.fileno())
        message, pidfds, _, _ = socket.recv_fds(ours, PID.size, 1)
        if len(message) < PID.size or not pidfds:
            raise ConnectionResetError("it, or the fork server, ended at once")
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return _Link(PID.unpack(message)[0], pidfds[0], reader, writer)
    except BaseException:
        ours.close()
        for pidfd in pidfds:
            os.close(pidfd)
        raise


class _ForkServer:
    """The process that forks the environments' processes; started at the first fork."""

    def __init__(self) -> None:
        if not hasattr(os, "pidfd_open"):
            raise OSError("environment processes need Linux 5.3 or later (pidfd)")
        self.owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def fork(self, channel: socket.socket) -> None:
        """Fork a process that serves an environment on `channel`. Raises OSError."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._control is not None
            socket.send_fds(self._control, [b"\0"], [channel.fileno()])

    def close(self) -> None:
        """End the fork server, and with it every remaining environment process."""
        with self._lock:
            if self._control is not None:
                self._control.close()
            if self._process is not None:
                try:
                    self._process.wait(_FORK_SERVER_DEADLINE_S)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
            self._process = self._control = None

    def _start(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_FORK_SERVER_DEADLINE_S)
        module_path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": module_path}
        # Threads of a numeric library do not survive a fork, and environments do not need them.
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "actors.rollouts.environment_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment,
                # Ctrl-C in the terminal should reach the driver only, not every environment.
                start_new_session=True,
            )


_fork_server_lock = threading.Lock()
_fork_server: _ForkServer | None = None


def _fork_server_of_this_process() -> _ForkServer:
    global _fork_server
    with _fork_server_lock:
        # A forked copy of a driver needs a fork server of its own.
        if _fork_server is None or _fork_server.owner_pid != os.getpid():
            _fork_server = _ForkServer()
            atexit.register(_fork_server.close)
        return _fork_server
