"""Watch the actors that Ray restarts and count every recovery, while the controller runs."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError

from actors.repeated_failures import RepeatedFailures
from cluster.errors import CosoError, DeadlineExceeded

Result = TypeVar("Result")

#: Time between two status calls to an actor, seconds.
WATCH_INTERVAL_S = 1.0


class Supervisor:
    """Asks every watched actor for its status once a second. A changed process id means that Ray restarted the actor:
    the restart is counted, and `on_restart` restores the state of the new process. An actor that dies twice for the
    same reason, and answered no request and made no step in between, ends the run.

    recoveries: number of restarts in the whole run by kind ("policy server", "rollout worker", "environment",
    "scorer", "scm_trainer", "learner").
    """

    def __init__(self, max_recoveries: int, window_s: float, earlier: Mapping[str, int] | None = None) -> None:
        """max_recoveries: within any `window_s` seconds. earlier: recoveries before a resume, which are shown but do
        not count towards the limit."""
        self.recoveries: Counter[str] = Counter(earlier or {})
        self.status: dict[str, dict[str, Any]] = {}
        self._training_steps: dict[tuple[str, int], int] = {}  # actor and process id -> steps
        self._max_recoveries = max_recoveries
        self._window_s = window_s
        self._recent: deque[tuple[float, str]] = deque()  # time and kind of the recoveries within the window
        self._totals: Counter[str] = Counter()  # as last told to `count_total`
        self._failures = RepeatedFailures()
        self._tasks: list[asyncio.Task[None]] = []

    def watch(
        self,
        kind: str,
        index: int,
        actor: Any,
        silence_deadline_s: float,
        on_restart: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Watch an actor that has `status()`. If it is silent beyond the deadline (seconds), the run ends with an error
        that names it."""
        self._tasks.append(asyncio.create_task(self._watch(kind, index, actor, silence_deadline_s, on_restart)))

    def count(self, kind: str, times: int = 1) -> None:
        """Count recoveries. Raises `CosoError` if there are more than `max_recoveries` within the window. Environments
        do not count towards this limit, since they have their own back-off."""
        self.recoveries[kind] += times
        if kind == "environment":
            return
        now = time.monotonic()
        self._recent.extend([(now, kind)] * times)
        while self._recent and self._recent[0][0] < now - self._window_s:
            self._recent.popleft()
        if len(self._recent) > self._max_recoveries:
            by_kind = dict(Counter(recent for _, recent in self._recent))
            raise CosoError(
                f"gave up after more than {self._max_recoveries} recoveries within {self._window_s:.0f} s "
                f"(cluster.max_recoveries, cluster.recovery_window_s): {by_kind}. "
                "Some process keeps dying; its logs say why."
            )

    def count_total(self, kind: str, total: int) -> None:
        """Count recoveries of a kind for which the caller knows the total since the start of this process."""
        if total > self._totals[kind]:
            new, self._totals[kind] = total - self._totals[kind], total
            self.count(kind, new)

    def failed(self, kind: str, reason: str, index: int | None = None) -> None:
        """Count the recovery from a failure with a known reason; index: of the actor, where there are several.

        Raises `CosoError` that quotes the reason where `RepeatedFailures` says that to try once more would not help.
        """
        if verdict := self._failures.verdict(kind if index is None else f"{kind} {index}", reason):
            raise CosoError(verdict)
        self.count(kind)

    def progressed(self, kind: str = "learner") -> None:
        """The learner has come further than ever before; whatever fails from here on fails for the first time."""
        self._failures.progressed(kind)

    def note(self, name: str, status: Mapping[str, Any]) -> None:
        """Keep an actor's status as its present one, and count the training steps in it."""
        self.status[name] = dict(status)
        process = (name, status["pid"])
        self._training_steps[process] = max(self._training_steps.get(process, 0), status.get("training_steps", 0))

    @property
    def training_steps(self) -> int:
        """Steps made in training episodes since the start, by all processes that the actors have had."""
        return sum(self._training_steps.values())

    def raise_failures(self) -> None:
        """Raise the error of a watch that has failed, if any."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def guard(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` and return its result. If a watch fails first, cancel `work` and raise the watch's error."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.raise_failures()
            return await task
        finally:
            task.cancel()

    async def close(self) -> None:
        """Stop all watches."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _watch(
        self,
        kind: str,
        index: int,
        actor: Any,
        silence_deadline_s: float,
        on_restart: Callable[[], Awaitable[None]] | None,
    ) -> None:
        name = f"{kind} {index}"
        pid: int | None = None
        environment_restarts = 0
        why_silent = ""
        last_sign = time.monotonic()
        while True:
            try:
                # In Python 3.11, asyncio.wait_for loses a cancellation that arrives together with the answer.
                async with asyncio.timeout(silence_deadline_s):
                    status: Mapping[str, Any] = await actor.status.remote()
            except RayTaskError:
                raise  # the actor is alive and reports an error
            except (RayActorError, TimeoutError) as error:
                if time.monotonic() - last_sign > silence_deadline_s:
                    raise DeadlineExceeded(
                        f"{name} gave no sign of life for {silence_deadline_s:.0f} s: {error or 'no answer'}"
                    ) from None
                why_silent = str(error) or why_silent
                await asyncio.sleep(WATCH_INTERVAL_S)
                continue
            last_sign = time.monotonic()
            if pid is not None and status["pid"] != pid:
                if reason := status.get("last_failure") or why_silent:
                    self.failed(kind, reason, index)
                else:
                    self.count(kind)
                environment_restarts = 0
                if on_restart is not None:
                    try:
                        await on_restart()
                    except RayActorError as error:
                        pid, why_silent = status["pid"], str(error)
                        continue  # it died again; the next status has another process id
            pid, why_silent = status["pid"], ""
            if status.get("requests") or status.get("steps"):  # of this process
                self._failures.progressed(name)
            if (restarts := status.get("restarts", 0)) > environment_restarts:
                self.count("environment", restarts - environment_restarts)
                environment_restarts = restarts
            self.note(name, status)
            await asyncio.sleep(WATCH_INTERVAL_S)
