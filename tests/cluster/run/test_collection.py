"""Batches from the workers: nothing too old, in an order that does not depend on who was first."""

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
from cluster.run.collection import StreamCollector, SynchronousCollector, drop_stale
from tests.actors.episodes import episode


class Remote:
    """A method as of an actor handle: `.remote(...)` gives an awaitable. The objects here are not Ray actors, because
    what is tested is what is asked of them and made of their answers, and not Ray."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self.remote = method


# ---------------------------------------------------------------- old data


@settings(max_examples=60, deadline=None)
@given(
    versions=st.lists(
        st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=3), min_size=0, max_size=5
    ),
    oldest=st.integers(-1, 6),
)
def test_exactly_the_episodes_with_a_token_that_is_too_old_are_dropped(
    versions: list[list[list[int]]], oldest: int
) -> None:
    batches = [
        episode(f"e{number}", [1.0] * len(steps), versions=steps, image=b"png") for number, steps in enumerate(versions)
    ]
    fresh = [f"e{number}" for number, steps in enumerate(versions) if min(min(spans) for spans in steps) >= oldest]
    kept = drop_stale(TrajectoryBatch.concatenate(batches), oldest)
    expected = TrajectoryBatch.concatenate([batch for batch in batches if batch.column("episode")[0] in fresh])
    assert kept.steps.equals(expected.steps)
    assert set(kept.steps["image"].to_pylist()) <= set(kept.images)


def stream_collector(stream: TrajectoryStream, workers: list[Any], **settings_: Any) -> StreamCollector:
    config = validate(
        {
            "training": {"steps_per_update": 4},
            "max_policy_lag": settings_.pop("max_policy_lag", 1),
            "rollout": {"stall_deadline_s": settings_.pop("stall_deadline_s", 20.0)},
        }
    )

    class Handle:
        allow = Remote(stream.allow)
        take = Remote(stream.take)
        status = Remote(stream.status)

    return StreamCollector(config, workers, Handle())


def test_the_stream_is_asked_for_more_until_enough_is_fresh_and_what_was_dropped_is_counted() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(1 << 20, 100)
        # Update 5 makes version 5 out of data made by version 3 or later, where the lag may be 1.
        for name, version in [("old", 2), ("fresh", 3), ("older", 1), ("new", 4), ("next", 4)]:
            await stream.put(name, episode(name, [0.0, 0.0], versions=[[version], [version]]))
        batch, row = await stream_collector(stream, []).collect(5)
        assert list(batch.column("episode")) == ["fresh", "fresh", "new", "new"]
        assert row["lag/dropped_steps"] == 4
        assert row["queue/steps"] == 2 and row["queue/episodes"] == 1

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_stream_that_stays_dry_ends_with_what_is_missing_and_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "STREAM_POLL_S", 0.05)

    class Worker:
        @staticmethod
        async def _status() -> dict[str, Any]:
            return {"failures": {"died": 3}}

        status = Remote(_status)

    async def scenario() -> None:
        stream = TrajectoryStream(1 << 20, 100)
        await stream.put("0-0", episode("only", [0.0]))
        with pytest.raises(DeadlineExceeded) as error:
            await stream_collector(stream, [Worker()], stall_deadline_s=0.2).collect(1)
        for part in ("rollout.stall_deadline_s", "4 steps missing", "1 waiting", "'died': 3"):
            assert part in str(error.value)

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
        async def _take(steps: int, wait_s: float) -> TrajectoryBatch:
            return episode("e", [0.0] * steps, versions=[[99]] * steps)

        @staticmethod
        async def _status() -> dict[str, float]:
            return dict.fromkeys(("steps", "episodes", "bytes", "rss_bytes"), 0.0)

        allow, take, status = Remote(_allow), Remote(_take), Remote(_status)

    config = validate({"training": {"steps_per_update": 4}, "max_policy_lag": lag})

    def usable_after(update: int, version: int) -> int:
        """Updates after `update` that may train on what `version` makes."""
        return sum(later - 1 - version <= lag for later in range(update + 1, 99))

    async def scenario() -> None:
        collector = StreamCollector(config, [], Handle())
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


def test_a_worker_that_does_not_answer_is_named_with_its_deadline() -> None:
    class Worker:
        @staticmethod
        async def _collect(update: int, steps: int) -> None:
            await asyncio.sleep(3600)

        collect = Remote(_collect)

    async def scenario() -> None:
        config = validate({"rollout": {"stall_deadline_s": 0.1}})
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"rollout worker 0: .*rollout\.stall_deadline_s.*within 0 s"):
            await SynchronousCollector(config, [Worker()]).collect(1)
        assert time.monotonic() - begun < 10

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
