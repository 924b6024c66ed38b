"""The stream between rollouts and learner: in order, bounded, and nothing is lost or held too long.

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

from actors.stream import TrajectoryStream
from actors.trajectory import TrajectoryBatch
from tests.actors.episodes import episode

PLENTY = 1 << 30


def run(scenario: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario, 30))


def steps(name: str, count: int, image: bytes = b"") -> TrajectoryBatch:
    return episode(name, [0.0] * count, image=image)


def names(batch: TrajectoryBatch | None) -> list[str]:
    assert batch is not None
    return list(dict.fromkeys(batch.column("episode")))


async def settled() -> None:
    """Let everything that can go on go on."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_episodes_come_out_whole_in_the_order_they_came_in() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 100)
        for name in "abcde":
            await stream.put(steps(name, 2, image=name.encode()))
        first = await stream.take(3, 1.0)
        assert names(first) == ["a", "b"] and first is not None
        assert first.column("step").tolist() == [0, 1, 0, 1]
        assert first.images == {"image-a": b"a", "image-b": b"b"}
        assert names(await stream.take(1, 1.0)) == ["c"]
        assert names(await stream.take(4, 1.0)) == ["d", "e"]

    run(scenario())


@pytest.mark.parametrize("bound", ["steps", "bytes"])
def test_a_full_stream_makes_put_wait_until_something_is_taken(bound: str) -> None:
    async def scenario() -> None:
        size = steps("a", 2).nbytes
        stream = TrajectoryStream(2 * size if bound == "bytes" else PLENTY, 4 if bound == "steps" else 1000)
        assert await stream.put(steps("a", 2)) < 1.0
        await stream.put(steps("b", 2))
        waiting = [asyncio.create_task(stream.put(steps(name, 2))) for name in "cd"]
        await settled()
        assert not any(task.done() for task in waiting)
        assert (await stream.status())["steps"] == 4
        await asyncio.sleep(0.05)
        assert names(await stream.take(1, 1.0)) == ["a"]
        assert await waiting[0] >= 0.05
        await settled()
        assert not waiting[1].done()
        assert names(await stream.take(4, 1.0)) == ["b", "c"]
        await waiting[1]
        assert names(await stream.take(2, 1.0)) == ["d"]

    run(scenario())


def test_an_ask_larger_than_the_capacity_is_met() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(1, 3)

        async def produce() -> None:
            for number in range(20):
                await stream.put(steps(f"e{number}", 2))

        producer = asyncio.create_task(produce())
        await settled()
        assert (await stream.status())["episodes"] == 1  # the first is let in whatever its size
        taken = await stream.take(25, 5.0)
        assert names(taken) == [f"e{number}" for number in range(13)]
        await settled()
        assert (await stream.status())["steps"] <= 4  # met, the ask no longer opens the gate
        producer.cancel()

    run(scenario())


def test_a_take_that_is_not_met_in_time_takes_nothing() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 100)
        await stream.put(steps("a", 2))
        assert await stream.take(3, 0.02) is None
        assert await stream.take(3, 0.0) is None
        assert (await stream.status())["steps"] == 2
        await stream.put(steps("b", 2))
        assert names(await stream.take(3, 0.0)) == ["a", "b"]  # what is there needs no waiting

    run(scenario())


def test_a_take_waits_for_what_is_still_to_come() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 100)
        taking = asyncio.create_task(stream.take(4, 10.0))
        for name in "ab":
            await settled()
            assert not taking.done()
            await stream.put(steps(name, 2))
        assert names(await taking) == ["a", "b"]

    run(scenario())


def test_a_cancelled_put_or_take_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 2)
        await stream.put(steps("a", 2))
        lost = asyncio.create_task(stream.put(steps("lost", 2)))
        await settled()
        lost.cancel()
        taking = asyncio.create_task(stream.take(50, 10.0))
        await settled()
        taking.cancel()
        await asyncio.gather(lost, taking, return_exceptions=True)
        assert names(await stream.take(2, 1.0)) == ["a"]
        await stream.put(steps("b", 2))
        assert names(await stream.take(2, 1.0)) == ["b"]

    run(scenario())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    producers=st.integers(1, 8),
    capacity_steps=st.integers(1, 12),
    capacity_episodes=st.integers(1, 4),
)
def test_many_producers_lose_nothing_keep_their_order_and_stay_within_bounds(
    seed: int, producers: int, capacity_steps: int, capacity_episodes: int
) -> None:
    draw = random.Random(seed)
    lengths = [[draw.randint(1, 5) for _ in range(draw.randint(1, 8))] for _ in range(producers)]
    largest = steps("p0-0", 5, b"x" * 100).nbytes
    capacity_bytes = capacity_episodes * largest

    async def scenario() -> list[str]:
        stream = TrajectoryStream(capacity_bytes, capacity_steps)

        async def produce(producer: int) -> None:
            for number, length in enumerate(lengths[producer]):
                await stream.put(steps(f"p{producer}-{number}", length, b"x" * 100))
                for _ in range(draw.randint(0, 2)):
                    await asyncio.sleep(0)

        tasks = [asyncio.create_task(produce(number)) for number in range(producers)]
        left = sum(map(sum, lengths))
        received: list[str] = []
        while left:
            wanted = min(left, draw.randint(1, 10))
            await settled()
            status = await stream.status()
            # The last one let in may go past a bound, by its own size.
            assert status["steps"] < capacity_steps + 5 and status["bytes"] < capacity_bytes + 2 * largest
            taken = await stream.take(wanted, 20.0)
            assert taken is not None and len(taken) >= wanted
            assert len(taken) - wanted < 5  # not one episode more than was needed
            received += names(taken)
            left -= len(taken)
        await asyncio.gather(*tasks)
        status = await stream.status()
        assert status["bytes"] == status["steps"] == status["episodes"] == 0
        return received

    received = run(scenario())
    assert sorted(received) == sorted(f"p{p}-{n}" for p, lens in enumerate(lengths) for n in range(len(lens)))
    for producer in range(producers):
        own = [name for name in received if name.startswith(f"p{producer}-")]
        assert own == [f"p{producer}-{number}" for number in range(len(own))]


def test_status_tells_what_is_held_and_what_ever_came() -> None:
    async def scenario() -> None:
        stream = TrajectoryStream(PLENTY, 100)
        a, b = steps("a", 1, b"xyz"), steps("b", 3)
        await stream.put(a)
        await stream.put(b)
        await asyncio.sleep(0.02)
        status = await stream.status()
        assert (status["episodes"], status["steps"]) == (2, 4)
        assert status["bytes"] == status["bytes_in"] == a.nbytes + b.nbytes
        assert 0.02 <= status["idle_seconds"] < 10
        await stream.take(1, 1.0)
        status = await stream.status()
        assert status["bytes"] == b.nbytes and status["bytes_in"] == a.nbytes + b.nbytes

    run(scenario())
