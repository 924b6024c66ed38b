"""The stream between rollouts and learner: the freshest first, bounded, and nothing is lost or held too long.

It is tested as the plain asyncio object it is; as a Ray actor its methods run in one event loop just the same.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.rollouts.stream import TrajectoryStream
from actors.trajectory import TrajectoryBatch
from tests.actors.episodes import episode

PLENTY = 1 << 30


def run(scenario: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario, 30))


def steps(name: str, count: int, image: bytes = b"") -> TrajectoryBatch:
    return episode(name, [0.0] * count, image=image)


async def put(stream: TrajectoryStream, name: str, count: int, image: bytes = b"") -> float:
    """As an environment of its own does when it has finished an episode."""
    return await stream.put(name, steps(name, count, image))


def names(batch: TrajectoryBatch | None) -> list[str]:
    assert batch is not None
    return list(dict.fromkeys(batch.column("episode")))


async def settled() -> None:
    """Let everything that can go on go on."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_the_episodes_that_finished_last_come_out_first_whole_and_in_order() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 100)
        for name in "abcde":
            await put(stream, name, 2, image=name.encode())
        first = await stream.take(3, 1.0)
        assert names(first) == ["d", "e"] and first is not None
        assert first.column("step").tolist() == [0, 1, 0, 1]
        assert first.images == {"image-d": b"d", "image-e": b"e"}
        assert names(await stream.take(1, 1.0)) == ["c"]
        assert names(await stream.take(4, 1.0)) == ["a", "b"]

    run(scenario())


@settings(max_examples=60, deadline=None)
@given(
    versions=st.lists(
        st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=3), min_size=1, max_size=5
    ),
    oldest=st.integers(0, 6),
    late=st.integers(0, 5),
)
def test_exactly_the_episodes_without_a_fresh_step_are_dropped_and_counted(
    versions: list[list[list[int]]], oldest: int, late: int
) -> None:
    """late: number of episodes that come after the call that says what is too old."""
    fresh = [[min(spans) >= oldest for spans in steps] for steps in versions]
    kept = [f"e{number}" for number, steps in enumerate(fresh) if any(steps)]

    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 1000)
        split = max(0, len(versions) - late)
        for number, steps_ in enumerate(versions):
            if number == split:
                assert await stream.take(1000, 0.0, oldest) is None
            await stream.put(str(number), episode(f"e{number}", [1.0] * len(steps_), versions=steps_, image=b"png"))
        assert await stream.take(1000, 0.0, oldest) is None
        status = await stream.status()
        assert status["steps"] == sum(map(sum, fresh)) and status["episodes"] == len(kept)
        assert status["dropped_steps"] == sum(len(steps) for steps in fresh if not any(steps))
        if kept:
            taken = await stream.take(sum(map(sum, fresh)), 0.0, oldest)
            assert names(taken) == kept and taken is not None
            assert len(taken) == sum(len(steps) for steps in fresh if any(steps))  # with the steps that are too old
            assert set(taken.steps["image"].to_pylist()) == set(taken.images)
        assert (await stream.status())["bytes"] == 0

    run(scenario())


@pytest.mark.parametrize("bound", ["steps", "bytes"])
def test_what_is_finished_is_there_at_once_and_a_full_stream_lets_no_more_begin(bound: str) -> None:
    async def scenario() -> None:
        size = steps("a", 2).nbytes
        stream = TrajectoryStream(2 * size if bound == "bytes" else PLENTY, 4 if bound == "steps" else 1000)
        waiting = [asyncio.create_task(put(stream, name, 2)) for name in "abc"]
        await settled()
        assert (await stream.status())["steps"] == 6
        assert [task.done() for task in waiting] == [True, False, False]
        await asyncio.sleep(0.05)
        assert names(await stream.take(1, 1.0)) == ["c"]
        await settled()
        assert not waiting[1].done()
        assert names(await stream.take(4, 1.0)) == ["a", "b"]
        assert min(await asyncio.gather(*waiting[1:])) >= 0.05

    run(scenario())


def test_episodes_under_way_count_with_the_length_that_others_had() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 12)
        await stream.begin("a")
        await put(stream, "a", 4)  # 4 held, and a's next is under way: 8
        begun = [asyncio.create_task(stream.begin(name)) for name in "bcd"]
        await settled()
        assert [task.done() for task in begun] == [True, False, False]  # 12 expected
        await stream.take(1, 1.0)
        await settled()
        assert sum(task.done() for task in begun) == 2
        await stream.allow(13)
        await settled()
        assert all(task.done() for task in begun)

    run(scenario())


def test_an_environment_that_is_stuck_is_counted_on_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 0)
        taking = asyncio.create_task(stream.take(2, 20.0))
        await settled()
        await asyncio.gather(stream.begin("stuck"), stream.begin("too"))  # steps enough for what is asked
        other = asyncio.create_task(stream.begin("other"))
        await settled()
        assert not other.done()
        monkeypatch.setattr("actors.rollouts.stream.FIRST_EPISODE_S", 0.0)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        assert await stream.take(2, 0.01) is None  # as the collector asks again and again
        await asyncio.wait_for(other, 5)
        next_one = asyncio.create_task(put(stream, "other", 2))
        assert names(await stream.take(2, 1.0)) == ["other"]
        next_one.cancel()

    run(scenario())


def test_nothing_begins_where_not_even_what_is_asked_for_may_be_made_yet() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, -4)
        taking = asyncio.create_task(stream.take(4, 20.0))
        begin = asyncio.create_task(stream.begin("a"))
        await settled()
        assert not begin.done()
        await stream.allow(0)
        await asyncio.wait_for(begin, 5)
        next_one = asyncio.create_task(put(stream, "a", 4))
        assert names(await taking) == ["a"]
        await settled()
        assert not next_one.done()
        next_one.cancel()

    run(scenario())


def test_an_ask_larger_than_the_bound_in_bytes_is_met() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(1, 3)

        async def produce() -> None:
            for number in range(20):
                await stream.put("the only", steps(f"e{number}", 2))

        producer = asyncio.create_task(produce())
        await settled()
        assert (await stream.status())["episodes"] == 1
        taken = await stream.take(25, 5.0)
        assert names(taken) == [f"e{number}" for number in range(13)]
        await settled()
        assert (await stream.status())["steps"] <= 4  # met, the ask no longer opens the gate
        producer.cancel()

    run(scenario())


def test_a_take_that_is_not_met_in_time_takes_nothing() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 100)
        await put(stream, "a", 2)
        assert await stream.take(3, 0.02) is None
        assert await stream.take(3, 0.0) is None
        assert (await stream.status())["steps"] == 2
        await put(stream, "b", 2)
        assert names(await stream.take(3, 0.0)) == ["a", "b"]  # what is there needs no waiting

    run(scenario())


def test_a_take_waits_for_what_is_still_to_come() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 100)
        taking = asyncio.create_task(stream.take(4, 10.0))
        for name in "ab":
            await settled()
            assert not taking.done()
            await put(stream, name, 2)
        assert names(await taking) == ["a", "b"]

    run(scenario())


def test_a_cancelled_call_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 2)
        put_and_waiting = asyncio.create_task(put(stream, "a", 2))
        await settled()
        put_and_waiting.cancel()
        taking = asyncio.create_task(stream.take(50, 10.0))
        await settled()
        taking.cancel()
        await asyncio.gather(put_and_waiting, taking, return_exceptions=True)
        assert names(await stream.take(2, 1.0)) == ["a"]
        await put(stream, "b", 1)
        assert names(await stream.take(1, 1.0)) == ["b"]

    run(scenario())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    producers=st.integers(1, 8),
    ahead=st.integers(0, 12),
    capacity_episodes=st.integers(1, 4),
)
def test_many_producers_lose_nothing_and_stay_within_bounds(
    seed: int, producers: int, ahead: int, capacity_episodes: int
) -> None:
    draw = random.Random(seed)
    lengths = [[draw.randint(1, 5) for _ in range(draw.randint(1, 8))] for _ in range(producers)]
    largest = steps("p0-0", 5, b"x" * 100).nbytes
    capacity_bytes = capacity_episodes * largest

    async def scenario() -> list[str]:
        stream = TrajectoryStream(capacity_bytes, ahead)

        async def produce(producer: int) -> None:
            await stream.begin(str(producer))
            for number, length in enumerate(lengths[producer]):
                await stream.put(str(producer), steps(f"p{producer}-{number}", length, b"x" * 100))
                for _ in range(draw.randint(0, 2)):
                    await asyncio.sleep(0)

        tasks = [asyncio.create_task(produce(number)) for number in range(producers)]
        left = sum(map(sum, lengths))
        received: list[str] = []
        while left:
            wanted = min(left, draw.randint(1, 10))
            await settled()
            status = await stream.status()
            # Those under way when a bound is reached may go past it: every producer's one.
            assert status["steps"] < ahead + 10 + 5 * producers
            assert status["bytes"] < capacity_bytes + (10 + producers) * largest
            # Producers that are through begin nothing more, as stuck environments do: the asker asks again.
            while (taken := await stream.take(wanted, 0.05)) is None:
                pass
            assert len(taken) >= wanted
            assert len(taken) - wanted < 5  # not one episode more than was needed
            received += names(taken)
            left -= len(taken)
        for task in tasks:  # the last ones wait to begin another
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        status = await stream.status()
        assert status["bytes"] == status["steps"] == status["episodes"] == 0
        return received

    received = run(scenario())
    assert sorted(received) == sorted(f"p{p}-{n}" for p, lens in enumerate(lengths) for n in range(len(lens)))


def test_status_tells_what_is_held_and_what_ever_came() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 100)
        a, b = steps("a", 1, b"xyz"), steps("b", 3)
        await stream.put("a", a)
        await stream.put("b", b)
        await asyncio.sleep(0.02)
        status = await stream.status()
        assert (status["episodes"], status["steps"]) == (2, 4)
        assert status["bytes"] == status["bytes_in"] == a.nbytes + b.nbytes
        assert 0.02 <= status["idle_seconds"] < 10
        await stream.take(1, 1.0)
        status = await stream.status()
        assert status["bytes"] == a.nbytes and status["bytes_in"] == a.nbytes + b.nbytes

    run(scenario())


def test_the_first_to_ask_is_the_first_to_begin_and_one_at_a_time_where_there_is_room_for_one() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 0)
        asking = [asyncio.create_task(stream.begin(name)) for name in "abc"]
        await settled()
        for begun in range(3):
            assert [task.done() for task in asking] == [number < begun for number in range(3)]
            await stream.allow(begun + 1)  # an episode is a step, as long as none has come in
            await settled()
        assert all(task.done() for task in asking)

    run(scenario())


def test_an_environment_whose_worker_was_replaced_waits_in_one_place_only() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 0)
        of_the_dead, other = asyncio.create_task(stream.begin("a")), asyncio.create_task(stream.begin("b"))
        await settled()
        again = asyncio.create_task(stream.begin("a"))
        await settled()
        assert of_the_dead.cancelled()
        await stream.allow(2)  # room for two: b, which came before a asked again, and a
        await asyncio.wait_for(asyncio.gather(other, again), 5)

    run(scenario())
