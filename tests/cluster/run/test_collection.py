"""Batches from the workers: nothing too old, in an order that does not depend on who was first; and how long is waited
for them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from actors.rollouts.stream import TrajectoryStream
from actors.rollouts.worker import EvaluationResult
from actors.trajectory import TrajectoryBatch
from cluster.config.files import validate
from cluster.errors import CosoError, DeadlineExceeded
from cluster.run import collection
from cluster.run.collection import StreamCollector, SynchronousCollector
from cluster.telemetry.summaries import episode_returns
from tests.actors.episodes import episode


class Remote:
    """A method as of an actor handle: `.remote(...)` gives an awaitable. The objects here are not Ray actors, because
    what is tested is what is asked of them and made of their answers, and not Ray."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self.remote = method


# ---------------------------------------------------------------- old data


def stream_collector(stream: TrajectoryStream, workers: list[Any], **settings_: Any) -> StreamCollector:
    config = validate(
        {
            "training": {"steps_per_update": settings_.pop("steps_per_update", 4)},
            "max_policy_lag": settings_.pop("max_policy_lag", 1),
            "rollout": {"silence_deadline_s": settings_.pop("silence_deadline_s", 20.0)},
        }
    )

    class Handle:
        allow = Remote(stream.allow)
        take = Remote(stream.take)
        status = Remote(stream.status)

    return StreamCollector(config, workers, Handle())


async def deliver(stream: TrajectoryStream, environment: str, finished: TrajectoryBatch) -> None:
    """Put an episode as an environment does, without waiting for the environment's next one."""
    putting = asyncio.create_task(stream.put(environment, finished))
    await asyncio.sleep(0)
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)


def test_the_freshest_come_first_and_what_was_dropped_is_counted_for_its_update() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(1 << 20, 100)
        # Update 5 makes version 5 out of data made by version 3 or later, where the lag may be 1.
        for name, version in [("old", 2), ("fresh", 3), ("older", 1), ("new", 4), ("next", 4)]:
            await deliver(stream, name, episode(name, [0.0, 0.0], versions=[[version], [version]]))
        collector = stream_collector(stream, [])
        batch, row = await collector.collect(5)
        assert list(batch.column("episode")) == ["new", "new", "next", "next"]
        assert row["lag/dropped_steps"] == 4
        assert row["queue/steps"] == 2 and row["queue/episodes"] == 1
        await deliver(stream, "last", episode("last", [0.0] * 4, versions=[[5]] * 4))
        batch, row = await collector.collect(6)
        assert list(batch.column("episode")) == ["last"] * 4
        assert row["lag/dropped_steps"] == 2  # "fresh", which no longer is

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_batch_holds_enough_steps_that_are_fresh() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(1 << 20, 100)
        for name in "abc":
            await deliver(stream, name, episode(name, [0.0] * 4, versions=[[1], [2], [3], [4]]))
        batch, _ = await stream_collector(stream, []).collect(5)  # the oldest fresh version is 3
        assert list(dict.fromkeys(batch.column("episode"))) == ["b", "c"] and len(batch) == 8

    asyncio.run(asyncio.wait_for(scenario(), 30))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), lag=st.integers(0, 3))
def test_what_is_trained_on_succeeds_as_often_as_what_was_collected(seed: int, lag: int) -> None:
    """2-step successes and 8-step failures that end at the same times: whether an episode succeeds says nothing about
    its age when it ends. Every two steps of an environment the learner makes a version."""
    draw = random.Random(seed)

    async def scenario() -> None:
        stream = TrajectoryStream(1 << 30, 10**6)
        collector = stream_collector(stream, [], max_policy_lag=lag, steps_per_update=1)
        collected, trained = [], []
        for update in range(10, 16):
            oldest = update - 1 - lag
            endings = [(age, length) for age in range(lag + 3) for length in (2, 8)]
            draw.shuffle(endings)
            for age, length in endings:
                last = update - 1 - age  # the version that sampled its last step
                versions = [[last - (length - 1 - step) // 2] for step in range(length)]
                rewards = [0.0] * (length - 1) + [float(length == 2)]
                collected.append(episode(f"{update}-{age}-{length}", rewards, versions=versions))
                await deliver(stream, f"{age}-{length}", collected[-1])
            await stream.take(10**6, 0.0, oldest)
            while (await stream.status())["steps"]:
                trained.append((await collector.collect(update))[0])
        assert sum(len(batch.episode_slices()) for batch in trained) == 6 * 2 * (lag + 1)
        of_trained, of_collected = map(TrajectoryBatch.concatenate, (trained, collected))
        assert episode_returns(of_trained).mean() == episode_returns(of_collected).mean() == 0.5

    asyncio.run(asyncio.wait_for(scenario(), 30))


@settings(max_examples=60, deadline=None)
@given(lag=st.integers(0, 4), updates=st.integers(1, 6), resumed_at=st.integers(0, 5))
def test_steps_are_made_only_for_updates_that_may_use_them(lag: int, updates: int, resumed_at: int) -> None:
    """Held against the rule itself: what version v makes is trained on by update u, from weights u - 1, if that is at
    most `max_policy_lag` later."""
    allowed: list[int] = []

    class Handle:
        @staticmethod
        async def _allow(ahead_steps: int) -> None:
            allowed.append(ahead_steps)

        @staticmethod
        async def _take(steps: int, wait_s: float, oldest_version: int) -> TrajectoryBatch:
            return episode("e", [0.0] * steps, versions=[[99]] * steps)

        @staticmethod
        async def _status() -> dict[str, float]:
            # Rollouts so slow that everything that may be used is needed.
            zeros = dict.fromkeys(("steps", "episodes", "bytes", "dropped_steps", "episode_seconds", "rss_bytes"), 0.0)
            return {**zeros, "steps_per_s": 1e-3}

        allow, take, status = Remote(_allow), Remote(_take), Remote(_status)

    config = validate({"training": {"steps_per_update": 4}, "max_policy_lag": lag})

    def usable_after(update: int, version: int) -> int:
        """Updates after `update` that may train on what `version` makes."""
        return sum(later - 1 - version <= lag for later in range(update + 1, 99))

    async def scenario() -> None:
        collector = StreamCollector(config, [], Handle())
        collector.trained(1.0, 1.0)
        if resumed_at:
            await collector.published(resumed_at)
            assert allowed[-1] == 4 * usable_after(resumed_at, resumed_at)
        for update in range(resumed_at + 1, resumed_at + updates + 1):
            # Batch `update` is collected while the learner makes version `update - 1` of the one before.
            if update > resumed_at + 1:
                await collector.collect(update)
                if lag > 0:
                    assert allowed[-1] == 4 * usable_after(update, update - 2)
                else:
                    assert allowed[-1] == -4  # nothing: not even this batch may be made before the next version
                await collector.published(update - 1)
            else:
                await collector.collect(update)
            assert allowed[-1] == 4 * usable_after(update, update - 1)

    asyncio.run(asyncio.wait_for(scenario(), 30))


# ---------------------------------------------------------------- evaluation


class Evaluator:
    """Answers `evaluate_batch` and `evaluate` with an episode per seed, in an order of its own."""

    def __init__(self, number: int, failing: set[int], deaths: int = 0) -> None:
        self.evaluate_batch = self.evaluate = Remote(self._evaluate)
        self._random = random.Random(number)
        self._failing = failing
        self._deaths = deaths
        self.asked: list[int] = []

    async def _evaluate(self, seeds: list[int], temperature: float) -> EvaluationResult:
        await asyncio.sleep(self._random.random() / 100)
        if self._deaths:
            self._deaths -= 1
            raise ActorDiedError
        self.asked = list(seeds)
        played = [seed for seed in seeds if seed not in self._failing]
        self._random.shuffle(played)
        batches = [episode(f"evaluation-{seed}", [temperature, 1.0], seed=seed) for seed in played]
        return EvaluationResult(TrajectoryBatch.concatenate(batches), len(seeds) - len(played))


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_evaluation_comes_in_the_order_of_the_seeds_however_it_was_shared_out(workers: int) -> None:
    async def scenario() -> None:
        seeds = range(1000, 1007)
        evaluators = [Evaluator(number, failing={1003}) for number in range(workers)]
        for collector in (
            SynchronousCollector(validate({}), evaluators),
            StreamCollector(validate({}), evaluators, None),
        ):
            result = await collector.evaluate(seeds, 0.5)
            kept = [seed for seed in seeds if seed != 1003]
            assert result.episodes.column("seed").tolist() == [seed for seed in kept for _ in range(2)]
            assert result.episodes.column("step").tolist() == [0, 1] * len(kept)
            assert result.failed == 1
            assert sorted(seed for evaluator in evaluators for seed in evaluator.asked) == list(seeds)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_worker_that_dies_is_asked_again_and_one_that_always_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    instant = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: instant(0))  # so that the test need not wait for Ray's pace

    async def scenario() -> None:
        collector = SynchronousCollector(validate({}), [Evaluator(0, set()), Evaluator(1, set(), deaths=2)])
        assert len((await collector.evaluate(range(4), 0.0)).episodes) == 8
        collector = SynchronousCollector(validate({}), [Evaluator(0, set()), Evaluator(1, set(), deaths=99)])
        with pytest.raises(CosoError, match="rollout worker 1 died 5 times: evaluation"):
            await collector.evaluate(range(4), 0.0)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_lock_step_batches_come_in_the_order_of_the_workers_and_hold_enough_steps() -> None:
    class Worker:
        def __init__(self, number: int) -> None:
            self.number = number
            self.collect = Remote(self._collect)

        async def _collect(self, update: int, steps: int) -> TrajectoryBatch:
            await asyncio.sleep((3 - self.number) / 100)
            return episode(f"{update}-{self.number}", [0.0] * steps)

    async def scenario() -> None:
        config = validate({"training": {"steps_per_update": 10}})
        batch, _ = await SynchronousCollector(config, [Worker(number) for number in range(3)]).collect(7)
        assert list(dict.fromkeys(batch.column("episode"))) == ["7-0", "7-1", "7-2"]
        assert len(batch) == 12

    asyncio.run(asyncio.wait_for(scenario(), 30))


# ---------------------------------------------------------------- deadlines


class BusyWorker:
    """Makes a step every `step_s` seconds, and answers `collect`, `evaluate_batch` and `evaluate` after `answer_s`."""

    def __init__(self, step_s: float, answer_s: float) -> None:
        self._started, self._step_s, self._answer_s = time.monotonic(), step_s, answer_s
        self.status = Remote(self._status)
        self.collect = Remote(self._collect)
        self.evaluate_batch = self.evaluate = Remote(self._evaluate)

    async def _status(self) -> dict[str, Any]:
        return {"steps": int((time.monotonic() - self._started) / self._step_s), "failures": {"died": 3}}

    async def _collect(self, update: int, steps: int) -> TrajectoryBatch:
        await asyncio.sleep(self._answer_s)
        return episode("e", [0.0] * steps)

    async def _evaluate(self, seeds: list[int], temperature: float) -> EvaluationResult:
        await asyncio.sleep(self._answer_s)
        return EvaluationResult(TrajectoryBatch.concatenate(episode(f"e{s}", [1.0], seed=s) for s in seeds), 0)


SILENT = {"step_s": 3600.0, "answer_s": 3600.0}
#: Steps come far more often than the deadline of silence, and the whole takes several times as long.
SLOW = {"step_s": 0.02, "answer_s": 1.5}
DEADLINE = {"rollout": {"silence_deadline_s": 0.4}}


def both_collectors(worker: BusyWorker) -> list[Any]:
    return [SynchronousCollector(validate(DEADLINE), [worker]), StreamCollector(validate(DEADLINE), [worker], None)]


def test_an_evaluation_may_take_longer_than_the_deadline_of_silence() -> None:
    async def scenario() -> None:
        for collector in both_collectors(BusyWorker(**SLOW)):
            assert len((await collector.evaluate(range(3), 0.0)).episodes) == 3

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_an_evaluation_without_a_step_ends_and_says_for_how_long_nothing_happened() -> None:
    async def scenario() -> None:
        for collector in both_collectors(BusyWorker(**SILENT)):
            with pytest.raises(
                DeadlineExceeded,
                match=r"rollout worker 0, evaluation \(rollout\.silence_deadline_s\): no progress for \d+\.\d s",
            ):
                await collector.evaluate(range(3), 0.0)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_lock_step_batch_may_take_longer_than_the_deadline_of_silence_and_a_silent_worker_is_named() -> None:
    async def scenario() -> None:
        batch, _ = await SynchronousCollector(validate(DEADLINE), [BusyWorker(**SLOW)]).collect(1)
        assert len(batch) > 0
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"rollout worker 0, .*rollout\.silence_deadline_s.*no progress"):
            await SynchronousCollector(validate(DEADLINE), [BusyWorker(**SILENT)]).collect(1)
        assert time.monotonic() - begun < 10

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_stream_that_stays_dry_ends_with_what_is_missing_and_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "STREAM_POLL_S", 0.05)

    async def scenario() -> None:
        stream = TrajectoryStream(1 << 20, 100)
        await deliver(stream, "0-0", episode("only", [0.0]))
        with pytest.raises(DeadlineExceeded) as error:
            await stream_collector(stream, [BusyWorker(**SILENT)], silence_deadline_s=0.2).collect(1)
        for part in ("batch of update 1", "rollout.silence_deadline_s", "1 of 4 steps", "ended", "'died': 3"):
            assert part in str(error.value)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_batch_of_long_episodes_is_waited_for_while_steps_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "STREAM_POLL_S", 0.05)

    async def scenario() -> None:
        stream = TrajectoryStream(1 << 20, 100)
        collecting = asyncio.create_task(
            stream_collector(stream, [BusyWorker(**SLOW)], silence_deadline_s=0.4).collect(1)
        )
        await asyncio.sleep(1.5)
        await deliver(stream, "0-0", episode("long", [0.0] * 4))
        assert len((await collecting)[0]) == 4

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_silence_of_rollouts_that_have_to_wait_for_the_learner_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "STREAM_POLL_S", 0.05)

    async def scenario() -> None:
        stream = TrajectoryStream(1 << 20, 0)
        collector = stream_collector(stream, [BusyWorker(**SILENT)], max_policy_lag=0, silence_deadline_s=0.2)
        collecting = asyncio.create_task(collector.collect(2))  # made by version 1, which is not there yet
        await asyncio.sleep(0.8)
        assert not collecting.done()
        await collector.published(1)
        with pytest.raises(DeadlineExceeded, match="the batch of update 2"):
            await collecting

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_deadline_that_a_worker_itself_ran_into_keeps_its_words() -> None:
    class Worker:
        @staticmethod
        async def _collect(update: int, steps: int) -> None:
            raise TimeoutError("no policy server answered")

        collect = Remote(_collect)

    async def scenario() -> None:
        with pytest.raises(TimeoutError, match="no policy server answered"):
            await SynchronousCollector(validate({}), [Worker()]).collect(1)

    asyncio.run(asyncio.wait_for(scenario(), 30))
