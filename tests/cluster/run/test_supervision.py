"""Watching actors: a restart is seen once and answered, silence is told by name, and endless dying ends the run.

The actors are plain objects whose `status.remote()` gives an awaitable, as a Ray actor handle's does: how Ray kills and
restarts is Ray's, what is made of the answers is ours, and so every order of events can be had, at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from actors.serving.policy_engine import LastWords
from cluster.errors import CosoError, DeadlineExceeded
from cluster.run import supervision
from cluster.run.supervision import Supervisor


class Actor:
    """Answers `status` with the given answers in turn, the last one for ever; an exception is raised instead."""

    def __init__(self, *answers: dict[str, Any] | Exception | None) -> None:
        self._answers = list(answers)
        self.asked = 0
        self.status = self

    def remote(self) -> Awaitable[dict[str, Any]]:
        return self._answer()

    async def _answer(self) -> dict[str, Any]:
        answer = self._answers[min(self.asked, len(self._answers) - 1)]
        self.asked += 1
        if answer is None:  # it hangs
            await asyncio.sleep(3600)
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer

    async def seen(self, times: int) -> None:
        """Wait until the supervisor has asked that often, and once more to be through with the last answer."""
        while self.asked <= times:
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "WATCH_INTERVAL_S", 0.002)


def run(scenario: Callable[[Supervisor], Awaitable[None]], max_recoveries: int = 20) -> None:
    async def whole() -> None:
        supervisor = Supervisor(max_recoveries, 3600.0)
        try:
            await scenario(supervisor)
        finally:
            await supervisor.close()

    asyncio.run(asyncio.wait_for(whole(), 30))


async def failure(supervisor: Supervisor) -> BaseException:
    """What the supervisor raises, once it does."""
    while True:
        try:
            supervisor.raise_failures()
        except Exception as error:
            return error
        await asyncio.sleep(0.001)


def test_a_new_process_id_is_one_recovery_and_is_answered_once() -> None:
    async def scenario(supervisor: Supervisor) -> None:
        answered = []

        async def answer() -> None:
            answered.append(1)

        actor = Actor({"pid": 1}, {"pid": 1}, ActorDiedError(), *[{"pid": 2}] * 50, {"pid": 3})
        supervisor.watch("rollout worker", 0, actor, 10.0, answer)
        await actor.seen(6)
        assert supervisor.recoveries == {"rollout worker": 1} and len(answered) == 1
        await actor.seen(56)
        assert supervisor.recoveries == {"rollout worker": 2} and len(answered) == 2
        assert supervisor.status["rollout worker 0"] == {"pid": 3}
        supervisor.raise_failures()

    run(scenario)


def test_an_actor_that_dies_again_while_it_is_brought_back_is_brought_back_again() -> None:
    async def scenario(supervisor: Supervisor) -> None:
        calls = []

        async def answer() -> None:
            calls.append(1)
            if len(calls) == 1:
                raise ActorDiedError

        actor = Actor({"pid": 1}, {"pid": 2}, {"pid": 3})
        supervisor.watch("rollout worker", 0, actor, 10.0, answer)
        await actor.seen(8)
        supervisor.raise_failures()
        assert len(calls) == 2 and supervisor.recoveries == {"rollout worker": 2}

    run(scenario)


@pytest.mark.parametrize("silence", [None, ActorDiedError()], ids=["hangs", "stays dead"])
def test_silence_beyond_the_deadline_names_the_actor_and_the_deadline(silence: Exception | None) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        supervisor.watch("policy server", 0, Actor({"pid": 1}), 60.0)
        supervisor.watch("policy server", 7, Actor({"pid": 1}, silence), 0.2)
        begun = time.monotonic()
        error = await failure(supervisor)
        assert isinstance(error, DeadlineExceeded) and "policy server 7 gave no sign of life for 0 s" in str(error)
        assert 0.2 <= time.monotonic() - begun < 10

    run(scenario)


def test_silence_within_the_deadline_is_forgiven() -> None:
    async def scenario(supervisor: Supervisor) -> None:
        actor = Actor({"pid": 1}, *[ActorDiedError()] * 20, {"pid": 1})
        supervisor.watch("policy server", 0, actor, 20.0)
        await actor.seen(25)
        supervisor.raise_failures()
        assert not supervisor.recoveries

    run(scenario)


def test_what_a_living_actor_complains_of_is_raised_at_once_in_its_words() -> None:
    async def scenario(supervisor: Supervisor) -> None:
        # Ray raises an actor's TimeoutError as one that is a RayTaskError too.
        complaint = RayTaskError("status", "no policy server answered", TimeoutError("no policy server answered"))
        supervisor.watch("rollout worker", 0, Actor({"pid": 1}, complaint.as_instanceof_cause()), 3600.0)
        error = await failure(supervisor)
        assert isinstance(error, TimeoutError) and "no policy server answered" in str(error)

    run(scenario)


def test_environments_are_counted_by_what_each_worker_process_counts() -> None:
    async def scenario(supervisor: Supervisor) -> None:
        first = Actor({"pid": 1, "restarts": 2}, {"pid": 1, "restarts": 5}, {"pid": 2, "restarts": 1})
        second = Actor({"pid": 9, "restarts": 4})
        supervisor.watch("rollout worker", 0, first, 10.0)
        supervisor.watch("rollout worker", 1, second, 10.0)
        await first.seen(6)
        await second.seen(3)
        assert supervisor.recoveries["environment"] == 5 + 1 + 4  # a restarted worker begins at 0

    run(scenario)


def test_training_steps_are_summed_over_actors_and_over_the_processes_that_they_had() -> None:
    async def scenario(supervisor: Supervisor) -> None:
        first = Actor(*({"pid": 1, "training_steps": n} for n in (0, 4, 9)), {"pid": 2, "training_steps": 3})
        second = Actor({"pid": 3, "training_steps": 5})
        server = Actor({"pid": 4})
        for index, (kind, actor) in enumerate((("worker", first), ("worker", second), ("server", server))):
            supervisor.watch(kind, index, actor, 5.0)
            await actor.seen(4)
        assert supervisor.training_steps == 9 + 3 + 5
        supervisor.note("worker 0", {"pid": 2, "training_steps": 8})  # asked for in between
        supervisor.note("worker 0", {"pid": 2, "training_steps": 7})  # an older answer that comes later
        assert supervisor.training_steps == 9 + 8 + 5

    run(scenario)


def test_more_recoveries_than_allowed_end_the_run_and_say_of_what() -> None:
    async def scenario(supervisor: Supervisor) -> None:
        supervisor.watch("policy server", 0, Actor(*({"pid": number} for number in range(50))), 10.0)
        error = await failure(supervisor)
        assert isinstance(error, CosoError) and "more than 3 recoveries" in str(error)
        assert "{'policy server': 4}" in str(error) and "cluster.max_recoveries" in str(error)

    run(scenario, max_recoveries=3)


def test_environments_are_not_limited_but_everything_else_is_together() -> None:
    supervisor = Supervisor(2, 3600.0)
    supervisor.count("environment", 1000)
    supervisor.count("learner")
    supervisor.count_total("scorer", 1)
    supervisor.count_total("scorer", 1)  # nothing new
    assert supervisor.recoveries == {"environment": 1000, "learner": 1, "scorer": 1}
    with pytest.raises(CosoError, match="gave up"):
        supervisor.count_total("scorer", 2)


def test_only_recoveries_within_the_window_count_and_those_before_a_resume_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(supervision.time, "monotonic", lambda: now[0])
    supervisor = Supervisor(2, 60.0, {"learner": 2, "scorer": 3})
    for _ in range(10):
        supervisor.count("learner")
        supervisor.count("policy server")
        now[0] += 61.0
    supervisor.count_total("scorer", 1)  # of this process's pool, which knows nothing of the three before
    assert supervisor.recoveries == {"learner": 12, "policy server": 10, "scorer": 4}
    supervisor.count("learner")
    with pytest.raises(CosoError, match=r"more than 2 recoveries within 60 s .*'scorer': 1, 'learner': 2"):
        supervisor.count("learner")


def test_the_same_failure_twice_without_progress_is_final_and_quoted() -> None:
    supervisor = Supervisor(20, 3600.0)
    reason = "update: learner rank 0 failed: OutOfMemoryError: tried to allocate {} MiB (pid {}, 0x{:x})"
    supervisor.failed("learner", reason.format(20, 311, 0xABC))
    supervisor.failed("learner", "publish: learner rank 0 died (connection reset)")  # another one
    supervisor.progressed()
    supervisor.failed("learner", reason.format(21, 312, 0xABD))
    with pytest.raises(CosoError, match="learner failed twice in the same way.*OutOfMemoryError: tried to allocate 40"):
        supervisor.failed("learner", reason.format(40, 313, 0xDEF))
    assert supervisor.recoveries["learner"] == 3


@pytest.mark.parametrize("kind", ["policy server", "rollout worker"])
def test_an_actor_that_dies_twice_in_the_same_way_ends_the_run_unless_it_worked_in_between(kind: str) -> None:
    progress = {"policy server": "requests", "rollout worker": "steps"}[kind]

    def life(pid: int, worked: int, words: str = "") -> list[dict[str, Any]]:
        return [{"pid": pid, progress: worked, "last_failure": words}] * 2

    async def scenario(supervisor: Supervisor) -> None:
        first = "the vLLM engine died (RuntimeError: no kernel for {} bytes)"
        one = [*life(1, 9), *life(2, 3, first.format(1)), *life(3, 4, first.format(2)), *life(4, 0, first.format(3))]
        working = Actor(*one)
        supervisor.watch(kind, 0, working, 10.0)
        await working.seen(len(one))
        supervisor.raise_failures()
        assert supervisor.recoveries == {kind: 3}
        other = Actor(*life(1, 0), *life(2, 0, first.format(4)), *life(3, 0, "of age"), *life(4, 0, first.format(5)))
        supervisor.watch(kind, 1, other, 10.0)
        error = await failure(supervisor)
        assert isinstance(error, CosoError)
        assert f"the {kind} 1 failed twice in the same way" in str(error) and "no kernel for 5 bytes" in str(error)

    run(scenario)


class DiesAtWork:
    """Ends whenever it is to work, as a server does whose engine has no kernel for its model (a Ray actor class)."""

    def __init__(self, words: Path) -> None:
        self._last_words = LastWords(words)
        self._last_failure = self._last_words.read()

    async def status(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "requests": 0, "last_failure": self._last_failure}

    async def work(self) -> None:
        self._last_words.write("the vLLM engine died (RuntimeError: Unsupported head size)")
        os._exit(1)


def test_a_real_actor_that_always_dies_at_its_first_request_is_started_again_once(
    ray_cluster: Any, tmp_path: Path
) -> None:
    """Ray would start it again for ever."""
    actor = ray_cluster.remote(DiesAtWork).options(num_cpus=0, max_restarts=-1).remote(tmp_path / "words")

    async def scenario(supervisor: Supervisor) -> None:
        supervisor.watch("policy server", 0, actor, 60.0)

        async def ask() -> None:
            while True:
                with contextlib.suppress(RayActorError):
                    await actor.work.remote()
                await asyncio.sleep(0.1)

        with pytest.raises(CosoError, match="policy server 0 failed twice .*Unsupported head size"):
            await supervisor.guard(ask())
        assert supervisor.recoveries == {"policy server": 1}

    run(scenario)
    ray_cluster.kill(actor)


def test_nothing_is_allowed_to_die_where_no_recovery_is() -> None:
    Supervisor(0, 3600.0).count("environment")
    with pytest.raises(CosoError, match="more than 0"):
        Supervisor(0, 3600.0).count("learner")


def test_close_ends_every_watch() -> None:
    async def scenario(supervisor: Supervisor) -> None:
        actor = Actor({"pid": 1}, None)
        supervisor.watch("policy server", 0, actor, 3600.0)
        await actor.seen(1)
        await supervisor.close()
        assert not [task for task in asyncio.all_tasks() if "_watch" in repr(task)]
        supervisor.raise_failures()


def test_close_is_heard_also_in_the_moment_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "WATCH_INTERVAL_S", 0.0)

    async def scenario(supervisor: Supervisor) -> None:
        for _ in range(200):
            actor = Actor({"pid": 1})
            supervisor.watch("policy server", 0, actor, 3600.0)
            await actor.seen(2)
            await supervisor.close()

    run(scenario)

    run(scenario)


def test_a_watch_that_fails_ends_guarded_work_at_once_instead_of_at_its_end() -> None:
    async def main() -> None:
        supervisor = Supervisor(1, 3600.0)

        async def broken() -> None:
            raise DeadlineExceeded("policy server 0 gave no sign of life")

        supervisor._tasks.append(asyncio.create_task(broken()))
        with pytest.raises(DeadlineExceeded, match="policy server 0"):
            async with asyncio.timeout(5):
                await supervisor.guard(asyncio.sleep(60))

    asyncio.run(main())


def test_guarded_work_gives_its_own_result_or_error() -> None:
    async def main() -> None:
        supervisor = Supervisor(1, 3600.0)
        assert await supervisor.guard(asyncio.sleep(0, result=3)) == 3

        async def wrong() -> None:
            raise CosoError("no room")

        with pytest.raises(CosoError, match="no room"):
            await supervisor.guard(wrong())

    asyncio.run(main())
