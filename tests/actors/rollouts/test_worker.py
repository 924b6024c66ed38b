"""Rollout workers on real environment processes: whole episodes, and one broken environment holds up nobody.

The worker is used as a plain object and not as a Ray actor, so that its environment processes are this test's to kill.
The policy servers are made up: an engine has its own tests, takes half a minute to start, and does not answer as told.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

import gymnasium
import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError

import envs  # noqa: F401  (registers coso/...)
from actors.generation import Generation, GenerationRequest, Refusal
from actors.images import image_hash
from actors.rollouts.episode import EVALUATION_SEED_BASE
from actors.rollouts.stream import TrajectoryStream
from actors.rollouts.worker import RolloutLaunch, RolloutWorker
from actors.settings import RolloutSettings
from actors.trajectory import TrajectoryBatch
from envs.settings import EnvironmentSettings
from tests.envs_for_tests import TROUBLED

pytestmark = pytest.mark.integration

HELD_OUT = range(EVALUATION_SEED_BASE, EVALUATION_SEED_BASE + 6)
NUMBER_LINE = "coso/NumberLine-v0"


class Remote:
    """A method as of an actor handle: `.remote(...)` gives an awaitable."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self.remote = method


@cache
def states() -> dict[str, tuple[int, int]]:
    """What each picture of a NumberLine shows: image hash -> (current, target)."""
    env = gymnasium.make(NUMBER_LINE)
    found = {}
    for current in range(6):
        for target in range(6):
            if current != target:
                observation, _ = env.reset(options={"state": {"current": current, "target": target}})
                found[image_hash(observation["image"])] = (current, target)
    return found


def expert(request: GenerationRequest) -> str:
    current, target = states()[request.image]
    return f'{{"thoughts": "", "action": "{"+" if target > current else "-"}"}}'


def by_chance(request: GenerationRequest) -> str:
    """Depends on the request's seed alone, as sampling does."""
    return f'{{"thoughts": "", "action": "{random.Random(request.seed).choice("+-")}"}}'


class Server:
    """A policy server whose answers come from a function, after `delay_s`."""

    def __init__(self, policy: Callable[[GenerationRequest], str | Refusal], delay_s: float = 0.0) -> None:
        self.generate = Remote(self._generate)
        self.generate_batch = Remote(self._generate_batch)
        self.refusal = Remote(self._refusal)
        self.requests: list[GenerationRequest] = []
        self._policy = policy
        self._delay_s = delay_s

    async def _generate(self, request: GenerationRequest) -> Generation | Refusal:
        self.requests.append(request)
        await asyncio.sleep(self._delay_s)
        text = self._policy(request)
        if isinstance(text, Refusal):
            return text
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        logprobs = np.full(len(ids), -0.5, np.float32)
        return Generation(np.arange(3, dtype=np.int32), ids, logprobs, [(0, 0)], "stop", text, self._delay_s)

    async def _refusal(self, request: GenerationRequest) -> Refusal | None:
        answer = self._policy(request)
        return answer if isinstance(answer, Refusal) else None

    async def _generate_batch(self, requests: list[GenerationRequest]) -> list[Generation | Refusal]:
        return [await self._generate(request) for request in requests]


class StreamHandle:
    def __init__(self, stream: TrajectoryStream) -> None:
        self.begin = Remote(stream.begin)
        self.put = Remote(stream.put)


def made_worker(
    servers: list[Any],
    stream: StreamHandle | None = None,
    worker: int = 0,
    envs_per_worker: int = 3,
    answer_deadline_s: float = 20.0,
    **environment: Any,
) -> RolloutWorker:
    """environment: fields of `EnvironmentSettings`."""
    fields = {"deadline_s": 20.0, "start_deadline_s": 40.0, "restart_backoff_s": 0.05, "quarantine_after": 50}
    return RolloutWorker(
        EnvironmentSettings(**{"id": NUMBER_LINE, **fields, **environment}),
        RolloutSettings(envs_per_worker=envs_per_worker, max_new_tokens=16),
        RolloutLaunch(run="test", run_seed=1, worker=worker, answer_deadline_s=answer_deadline_s),
        servers,
        stream,
    )


def run(
    scenario: Callable[[RolloutWorker], Awaitable[Any]],
    servers: list[Any],
    stream: TrajectoryStream | None = None,
    **settings: Any,
) -> Any:
    """Run a scenario with a worker, for a minute at most, and stop the worker whatever happens."""

    async def whole() -> Any:
        worker = made_worker(servers, StreamHandle(stream) if stream else None, **settings)
        try:
            return await scenario(worker)
        finally:
            await asyncio.wait_for(worker.stop(), 20)
            assert (await worker.status())["environment_pids"] == []

    return asyncio.run(asyncio.wait_for(whole(), 60))


def check_whole(batch: TrajectoryBatch) -> None:
    """Every episode is there from its first step to its end, with every picture it shows."""
    for piece in batch.episode_slices():
        rows = batch.steps.slice(piece.start, piece.stop - piece.start).to_pylist()
        assert [row["step"] for row in rows] == list(range(len(rows)))
        assert [bool(row["end_reason"]) for row in rows] == [False] * (len(rows) - 1) + [True]
        assert len({row["seed"] for row in rows}) == 1
        assert all(row["image"] in batch.images for row in rows)
    names = [batch.column("episode")[piece.start] for piece in batch.episode_slices()]
    assert len(set(names)) == len(names)


def what_happened(batch: TrajectoryBatch) -> list[dict[str, Any]]:
    """The rows without their timings."""
    return batch.steps.drop_columns(["generate_seconds", "environment_seconds"]).to_pylist()


def ends(batch: TrajectoryBatch) -> list[str]:
    return [reason for reason in batch.column("end_reason") if reason]


async def until(condition: Callable[[], bool], what: str, deadline_s: float = 30.0) -> None:
    try:
        async with asyncio.timeout(deadline_s):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"waited {deadline_s} s for {what}") from None


# ---------------------------------------------------------------- lock-step


def test_the_label_space_is_known_before_the_first_episode() -> None:
    assert run(lambda worker: worker.label_sizes(), [Server(expert)]) == (2,)


def test_collect_gives_whole_episodes_and_the_same_ones_whatever_went_before() -> None:
    async def scenario(worker: RolloutWorker) -> list[TrajectoryBatch]:
        return [await worker.collect(update, 30) for update in (1, 2, 1)]

    first, second, again = run(scenario, [Server(by_chance)])
    for batch in (first, second):
        check_whole(batch)
        assert 30 <= len(batch) < 30 + 3 * 10
    assert what_happened(first) == what_happened(again)
    assert not set(first.column("seed")) & set(second.column("seed"))
    (fresh,) = run(lambda worker: asyncio.gather(worker.collect(1, 30)), [Server(by_chance, delay_s=0.001)])
    assert what_happened(fresh) == what_happened(first)
    (other,) = run(lambda worker: asyncio.gather(worker.collect(1, 30)), [Server(by_chance)], worker=1)
    assert not set(first.column("seed")) & set(other.column("seed"))


def test_an_evaluation_plays_every_seed_once_in_their_order() -> None:
    seeds = list(HELD_OUT)

    async def scenario(worker: RolloutWorker) -> Any:
        return await worker.evaluate_batch(seeds, 0.0), await worker.evaluate_batch([], 0.0)

    server = Server(expert)
    result, nothing = run(scenario, [server])
    check_whole(result.episodes)
    assert list(dict.fromkeys(result.episodes.column("seed"))) == seeds and result.failed == 0
    assert result.episodes.column("success").sum() == len(seeds)  # an expert who reads the picture never fails
    assert {request.temperature for request in server.requests} == {0.0}
    assert len(nothing.episodes) == 0 and nothing.failed == 0


def test_an_evaluation_whose_environments_keep_failing_says_how_many_it_lacks() -> None:
    bad = set()

    def policy(request: GenerationRequest) -> str:
        # Every second picture kills its environment, every time it is tried.
        if states()[request.image][0] % 2:
            bad.add(request.image)
            return "please die"
        return '{"thoughts": "", "action": "+"}'

    async def scenario(worker: RolloutWorker) -> Any:
        result = await worker.evaluate_batch(list(HELD_OUT), 0.0)
        return result, await worker.status()

    result, status = run(scenario, [Server(policy)], id=TROUBLED)
    played = set(result.episodes.column("seed"))
    assert bad and result.failed == len(HELD_OUT) - len(played) > 0
    assert set(ends(result.episodes)) <= {"terminated", "truncated"}
    assert status["failures"] == {"died": 3 * result.failed}  # each was tried three times
    assert status["steps"] >= len(result.episodes) and status["training_steps"] == 0
    check_whole(result.episodes)


def test_collect_goes_on_with_the_environments_that_work_and_ends_broken_episodes_as_such() -> None:
    count = 0

    def policy(request: GenerationRequest) -> str:
        nonlocal count
        count += 1
        return "please die" if count % 7 == 0 else by_chance(request)

    async def scenario(worker: RolloutWorker) -> Any:
        batch = await worker.collect(1, 40)
        return batch, await worker.status()

    batch, status = run(scenario, [Server(policy)], id=TROUBLED)
    check_whole(batch)
    assert len(batch) >= 40 and "environment_died" in ends(batch)
    lost = np.flatnonzero(batch.column("end_reason") == "environment_died")
    assert "please die" not in set(batch.column("utterance")[lost])  # the step that killed it is not in it
    assert status["restarts"] >= 1
    assert status["training_steps"] == len(batch)


# ---------------------------------------------------------------- free-running


async def received(stream: TrajectoryStream, episodes: int, wait_s: float = 20.0) -> list[TrajectoryBatch]:
    batches = []
    while len(batches) < episodes:
        taken = await stream.take(1, wait_s)
        assert taken is not None, f"{len(batches)} of {episodes} episodes came"
        batches.append(taken)
    return batches


def test_free_running_environments_stream_whole_episodes_until_stopped() -> None:
    stream = TrajectoryStream(1 << 30, 1000)

    async def scenario(worker: RolloutWorker) -> None:
        assert not (await worker.status())["running"]
        await worker.start(0)
        await worker.start(0)  # as the supervisor may do; nothing starts twice
        batches = await received(stream, 12)
        while {batch.column("slot")[0] for batch in batches} != {0, 1, 2}:  # a busy machine lets some begin late
            batches += await received(stream, 1)
        batch = TrajectoryBatch.concatenate(batches)
        check_whole(batch)
        assert max(batch.column("seed")) < EVALUATION_SEED_BASE
        status = await worker.status()
        assert status["running"] and status["steps"] >= len(batch) and len(status["environment_pids"]) == 3
        await worker.stop()
        assert not (await worker.status())["running"]
        held = (await stream.status())["bytes_in"]
        await asyncio.sleep(0.1)
        assert (await stream.status())["bytes_in"] == held

    run(scenario, [Server(expert)], stream)


def test_evaluation_goes_ahead_of_training_also_while_a_full_stream_holds_training_up() -> None:
    stream = TrajectoryStream(1, 1)

    async def scenario(worker: RolloutWorker) -> Any:
        await worker.start(0)
        await until(lambda: worker._steps >= 2, "training to begin")
        await asyncio.sleep(0.3)  # what was begun has ended by now, nobody takes it, and no more may begin
        held = (await stream.status())["episodes"]
        result = await asyncio.wait_for(worker.evaluate(list(HELD_OUT), 0.0), 20)
        assert 1 <= held <= 3 and (await stream.status())["episodes"] == held
        status = await worker.status()  # training was held up, so what it made is what the stream holds
        assert status["training_steps"] == status["steps"] - len(result.episodes) == (await stream.status())["steps"]
        # And training goes on where it was held up.
        check_whole(TrajectoryBatch.concatenate(await received(stream, 6)))
        return result

    result = run(scenario, [Server(expert)], stream)
    check_whole(result.episodes)
    assert sorted(set(result.episodes.column("seed"))) == list(HELD_OUT) and result.failed == 0


def test_an_environment_killed_in_mid_episode_ends_that_episode_and_no_other() -> None:
    stream = TrajectoryStream(1 << 30, 10**6)

    async def scenario(worker: RolloutWorker) -> None:
        await worker.start(0)
        await until(lambda: all(host.pid for host in worker._hosts), "every environment to run")
        batches: list[TrajectoryBatch] = []
        kills = 0
        while not any(ends(batch) == ["environment_died"] for batch in batches):
            # Between two episodes there is none to end, so it may take more than one try to hit one.
            victim = worker._hosts[1].pid
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            kills += 1
            await until(lambda kills=kills: worker._restarts == kills, "the environment to be back")
            await until(lambda: worker._hosts[1].pid is not None, "the environment to run")
            status = await worker.status()
            assert status["failures"] == {"died": kills} and status["restarts"] == kills
            assert victim not in status["environment_pids"]
            batches += await received(stream, 10)
        lost = [batch for batch in batches if ends(batch) == ["environment_died"]]
        assert all(set(batch.column("slot")) == {1} for batch in lost)
        for batch in lost:
            assert not batch.column("terminated").any()
            assert (batch.column("reward") <= 0).all()  # the goal was not reached, and a failure has no reward
        after = []
        while not any(batch.column("slot")[0] == 1 for batch in after):
            after = await received(stream, 1)  # the slot goes on
        check_whole(TrajectoryBatch.concatenate(batches))

    # Slowly, so that there nearly always is a mid-episode to be killed in.
    run(scenario, [Server(by_chance, delay_s=0.03)], stream)


def test_a_hanging_environment_is_ended_at_its_deadline_and_holds_up_nobody() -> None:
    stream = TrajectoryStream(1 << 30, 1000)
    asked = 0

    def policy(request: GenerationRequest) -> str:
        nonlocal asked
        asked += 1
        return "please hang" if asked == 10 else by_chance(request)

    async def scenario(worker: RolloutWorker) -> None:
        await worker.start(0)
        await until(lambda: asked >= 10, "an environment to hang")
        meanwhile = await received(stream, 3)  # from the others, who need not wait for it
        assert not any("environment_timeout" in ends(batch) for batch in meanwhile)
        await until(lambda: worker._failures["timeout"] == 1, "the deadline")
        await until(lambda: worker._restarts == 1, "the environment to be back")

    run(scenario, [Server(policy, 0.005)], stream, id=TROUBLED, deadline_s=2.0)


def test_a_step_that_hangs_ends_its_episode_as_a_timeout() -> None:
    asked = 0

    def policy(request: GenerationRequest) -> str:
        nonlocal asked
        asked += 1
        return "please hang" if asked == 2 else '{"thoughts": "", "action": "+"}'

    async def scenario(worker: RolloutWorker) -> Any:
        return await worker.collect(1, 4)

    batch = run(scenario, [Server(policy)], id=TROUBLED, envs_per_worker=1, deadline_s=1.0)
    check_whole(batch)
    first = batch.episode_slices()[0]
    # Of the first episode, the one step before the hanging one is left, unless it had reached its goal by then.
    assert batch.column("end_reason")[first.stop - 1] in ("environment_timeout", "terminated")
    assert first.stop - first.start == 1


# ---------------------------------------------------------------- policy servers


class DeadServer:
    """What a handle of an actor that died answers."""

    def __init__(self) -> None:
        self.asked = 0
        self.generate = self.generate_batch = self.refusal = Remote(self._die)

    async def _die(self, request: Any) -> None:
        self.asked += 1
        raise ActorDiedError


def test_while_a_server_is_dead_the_next_one_answers() -> None:
    stream = TrajectoryStream(1 << 30, 1000)
    dead, alive = DeadServer(), Server(expert)

    async def scenario(worker: RolloutWorker) -> None:
        batch = await worker.collect(1, 4)
        check_whole(batch)
        await worker.start(0)
        await received(stream, 4)

    run(scenario, [dead, alive], stream)
    assert dead.asked >= 2 and alive.requests


def test_when_no_server_answers_the_error_names_worker_and_deadline() -> None:
    async def scenario(worker: RolloutWorker) -> None:
        with pytest.raises(TimeoutError, match="no policy server answered rollout worker 4 within 1 s"):
            await worker.collect(1, 4)

    run(scenario, [DeadServer(), DeadServer()], worker=4, answer_deadline_s=0.6)


def test_what_a_living_server_says_is_wrong_with_a_request_is_raised_and_seen() -> None:
    stream = TrajectoryStream(1 << 30, 1000)

    def policy(request: GenerationRequest) -> str:
        raise RayTaskError("generate", "the prompt is too long", ValueError("the prompt is too long"))

    async def scenario(worker: RolloutWorker) -> None:
        with pytest.raises(RayTaskError, match="too long"):
            await worker.collect(1, 4)
        await worker.start(0)
        await until(lambda: any(task.done() for task in worker._slot_tasks), "a loop to end")
        with pytest.raises(RayTaskError, match="too long"):
            await worker.status()

    run(scenario, [Server(policy)], stream)


def test_episodes_of_a_restarted_worker_have_names_of_their_own_even_where_process_ids_repeat() -> None:
    """As in containers: here, both incarnations even are in one process."""

    async def first_names(worker: RolloutWorker) -> list[str]:
        return [next(worker._training_specs(0, slot)).name for slot in range(3)]

    before, after = run(first_names, []), run(first_names, [])
    assert len({*before, *after}) == 6
