"""The worker pool of scorers. A free scorer takes the next task; one that dies or does not answer is replaced."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

from actors.repeated_failures import RepeatedFailures

ACTOR_GONE = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)

logger = logging.getLogger(__name__)

#: While a call is under way, how often to ask its scorer whether it comes further, at most, seconds.
PROGRESS_POLL_S = 5.0


class ScoringError(RuntimeError):
    """Scoring cannot continue. The message says which actor failed, at which call, and how."""


@dataclass
class _Call:
    """A call in progress: what for, how long it may be silent, for which task (None: its result is not used).

    last: time of its last progress (monotonic). asked, progress: the question about its progress that is not answered
    yet and the time of it, and the last answer.
    """

    ref: ray.ObjectRef
    what: str
    limit_s: float
    task: int | None
    last: float
    asked_at: float
    asked: ray.ObjectRef | None = None
    progress: int | None = None

    @property
    def poll_s(self) -> float:
        return min(PROGRESS_POLL_S, self.limit_s / 4)


@dataclass
class _Slot:
    """The place of one scorer; its actor is replaced when it fails. why: the last one failed."""

    index: int
    actor: Any
    call: _Call | None = None
    failures: int = 0
    why: str = ""


class ScorerPool:
    """Driver's side of `count` scorer actors; one thread at a time may call it.

    make_actor: starts the scorer of an index (from 0) and returns its handle at once: an actor with `ping()` and
        `score(...)`, and with `progress()` and `set_waited_for(waited)`, which are answered during a task.
    start_deadline_s: for a scorer to start or answer a ping. task_deadline_s: for a scorer to finish a task or to make
        progress with it; a task as a whole may take longer.
    max_failures: a scorer and its replacements that fail, or a task whose scorers fail, this many times in a row are an
        error. A scorer that fails twice in the same way, without finishing a task in between, is one at once.
    replaced: scorers replaced since `start`.
    """

    def __init__(
        self,
        make_actor: Callable[[int], Any],
        *,
        count: int,
        start_deadline_s: float,
        task_deadline_s: float,
        max_failures: int,
    ) -> None:
        self.replaced = 0
        self._waited_for = False
        self._repeated = RepeatedFailures()
        self._make_actor = make_actor
        self._count = count
        self._start_deadline_s = start_deadline_s
        self._task_deadline_s = task_deadline_s
        self._max_failures = max_failures
        self._slots: list[_Slot] = []
        self._started = False

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits for the scores. May be set during `run`, by another thread."""
        return self._waited_for

    @waited_for.setter
    def waited_for(self, waited: bool) -> None:
        self._waited_for = waited
        for slot in list(self._slots):
            slot.actor.set_waited_for.remote(waited)

    def start(self) -> None:
        """Start all scorers and wait until each answers; raises ScoringError at the first that does not."""
        for index in range(self._count):
            slot = _Slot(index, self._make_actor(index))
            self._slots.append(slot)
            self._ping(slot, "start")
        self.check()
        self._started = True

    def check(self) -> list[dict[str, float]]:
        """Ping every scorer, replace those that do not answer, wait until all of them are up.

        Returns each scorer's `ping`, in order. Raises ScoringError when one keeps failing.
        """
        answers: dict[int, dict[str, float]] = {}
        while len(answers) < len(self._slots):
            for slot in self._slots:
                if slot.call is None and slot.index not in answers:
                    self._ping(slot, "answer a ping")
            for slot, _, answer in self._settle():
                if isinstance(answer, dict):
                    answers[slot.index] = answer
        return [answers[slot.index] for slot in self._slots]

    def run(self, tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call `score(*task)` once for every task and return the results in order of the tasks.

        A task whose scorer fails goes to another one; an exception in a scorer is raised here. Raises ScoringError when
        scorers keep failing.
        """
        if not self._slots:
            raise ScoringError("the scoring pool is not running: call start() first")
        results: dict[int, Any] = {}
        waiting = deque(range(len(tasks)))
        attempts: Counter[int] = Counter()
        repeated = RepeatedFailures()
        try:
            while len(results) < len(tasks):
                for slot in self._slots:
                    if slot.call is None and waiting:
                        task = waiting.popleft()
                        attempts[task] += 1
                        ref = slot.actor.score.remote(*tasks[task])
                        what = f"score task {task + 1} of {len(tasks)}"
                        self._note(slot, ref, what, self._task_deadline_s, task)
                for slot, call, answer in self._settle():
                    if call.task is None:
                        continue
                    if answer is None and (verdict := repeated.verdict(f"scoring of task {call.task + 1}", slot.why)):
                        raise ScoringError(verdict)
                    if answer is not None:
                        results[call.task] = answer
                    elif attempts[call.task] < self._max_failures:
                        waiting.appendleft(call.task)
                    else:
                        raise ScoringError(
                            f"scorers failed {attempts[call.task]} times to {call.what}; the log gives the reasons"
                        )
        finally:
            # After an error, calls may still be in progress; their results are not used.
            for slot in self._slots:
                if slot.call is not None:
                    slot.call.task = None
        return [results[task] for task in range(len(tasks))]

    def close(self) -> None:
        """End all scorers, each by its handle; may be called twice."""
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots, self._started = [], False

    def _ping(self, slot: _Slot, what: str) -> None:
        self._note(slot, slot.actor.ping.remote(), what, self._start_deadline_s, None)

    def _note(self, slot: _Slot, ref: ray.ObjectRef, what: str, limit_s: float, task: int | None) -> None:
        now = time.monotonic()
        slot.call = _Call(ref, what, limit_s, task, last=now, asked_at=now)

    def _settle(self) -> Iterator[tuple[_Slot, _Call, Any]]:
        """Wait for a while until a call ends or was silent for too long; yield (slot, call, answer) of each such call.

        The answer is None where the call failed; its scorer is then being replaced.
        """
        calls = {slot.call.ref: slot.call for slot in self._slots if slot.call is not None}
        ray.wait(list(calls), num_returns=1, timeout=min(call.poll_s for call in calls.values()))
        ended, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        now = time.monotonic()
        for slot in self._slots:
            call = slot.call
            if call is None:
                continue
            if call.ref in ended:
                slot.call = None
                try:
                    answer = ray.get(call.ref, timeout=call.limit_s)
                except ACTOR_GONE as error:
                    self._replace(slot, f"died when asked to {call.what}: {_in_short(error)}")
                    yield slot, call, None
                else:
                    slot.failures = 0
                    if call.task is not None:
                        self._repeated.progressed(f"scorer {slot.index}")
                    yield slot, call, answer
                continue
            self._look_at(slot, call)
            if now >= call.last + call.limit_s:
                slot.call = None
                self._replace(slot, f"did not {call.what} within {call.limit_s:g} s, and made no progress")
                yield slot, call, None

    def _look_at(self, slot: _Slot, call: _Call) -> None:
        """Ask a scorer at work how far it is, and note whether it came further since it was asked before."""
        if call.asked is not None and ray.wait([call.asked], timeout=0)[0]:
            try:
                done = ray.get(call.asked)
            except ACTOR_GONE:
                return  # its call fails, too
            if call.progress is not None and done > call.progress:
                call.last = call.asked_at
            call.asked, call.progress = None, done
        elif call.asked is None and call.task is not None and time.monotonic() >= call.asked_at + call.poll_s:
            call.asked, call.asked_at = slot.actor.progress.remote(), time.monotonic()

    def _replace(self, slot: _Slot, why: str) -> None:
        slot.failures += 1
        slot.why = why
        story = f"scorer {slot.index} {why}"
        logger.warning("%s; replacing it", story)
        ray.kill(slot.actor)
        if verdict := self._repeated.verdict(f"scorer {slot.index}", why):
            raise ScoringError(verdict)
        if not self._started or slot.failures >= self._max_failures:
            raise ScoringError(f"{story} (failure {slot.failures} in a row)")
        self.replaced += 1
        slot.actor = self._make_actor(slot.index)
        if self._waited_for:
            slot.actor.set_waited_for.remote(True)
        self._ping(slot, "start")


def _in_short(error: BaseException) -> str:
    """Put Ray's many lines about an actor's death on one; of an error in its constructor, that error."""
    lines = str(error).strip().splitlines()
    if lines and "creation task" in lines[0]:
        return lines[-1].strip()
    return " ".join(str(error).split())[:500]
