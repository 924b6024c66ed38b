"""What is made ahead: neither lag nor drops where the learner is slower, no waiting where the rollouts are.

Rollouts and learner are simulated with their times; stream, collector and pacing are the real ones. The event loop's
clock jumps to the next event, so a simulated hour takes a second and gives the same result on every machine.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.rollouts import stream as stream_module
from actors.rollouts.stream import TrajectoryStream
from cluster.config.files import validate
from cluster.run import collection, waiting
from cluster.run.collection import StreamCollector
from cluster.run.pacing import Pace, steps_ahead
from cluster.telemetry.summaries import lag_metrics
from tests.actors.episodes import episode

PER_UPDATE = 192


class Remote:
    """A method as of an actor handle: `.remote(...)` gives an awaitable."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self.remote = method


class VirtualClock(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer as soon as nothing else is to be done."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._now = max(self._now, self._scheduled[0].when())
        super()._run_once()  # type: ignore[misc]


@dataclass
class Simulation:
    """seconds: of a step of one environment (half to one and a half times that), of a learner's update and of
    scoring a batch. lengths: steps of an episode, drawn evenly."""

    step_s: float
    learner_s: float
    scoring_s: float = 1.0
    lengths: tuple[int, ...] = (2, 4, 6, 8)
    environments: int = 32
    max_policy_lag: int = 2
    version: int = 0
    steps: int = 0
    lags: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    dropped: float = 0.0
    trained: float = 0.0

    async def environment(self, number: int, stream: TrajectoryStream) -> None:
        draw = random.Random(number)
        await stream.begin(str(number))
        for count in range(10**9):
            versions = []
            for _ in range(draw.choice(self.lengths)):
                versions.append([self.version])
                await asyncio.sleep(self.step_s * draw.uniform(0.5, 1.5))
                self.steps += 1
            await stream.put(str(number), episode(f"{number}-{count}", [0.0] * len(versions), versions=versions))

    async def status(self) -> dict[str, Any]:
        return {"steps": self.steps, "failures": {}}

    async def prepare(self, collector: StreamCollector, update: int) -> Any:
        batch, row = await collector.collect(update)
        await asyncio.sleep(self.scoring_s)
        return batch, row

    async def train(self, updates: int) -> None:
        """The loop of `cluster.run.controller`."""
        stream = TrajectoryStream(1 << 30, 0)
        handle = SimpleNamespace(allow=Remote(stream.allow), take=Remote(stream.take), status=Remote(stream.status))
        config = validate(
            {"training": {"steps_per_update": PER_UPDATE}, "max_policy_lag": self.max_policy_lag, "mode": "async"}
        )
        collector = StreamCollector(config, [SimpleNamespace(status=Remote(self.status))], handle)
        rollouts = [asyncio.create_task(self.environment(i, stream)) for i in range(self.environments)]
        clock = asyncio.get_running_loop().time
        upcoming = asyncio.create_task(self.prepare(collector, 1))
        for update in range(1, updates + 1):
            started = clock()
            batch, row = await upcoming
            self.waits.append(clock() - started)
            upcoming = asyncio.create_task(self.prepare(collector, update + 1))
            lag = lag_metrics(batch, update - 1, self.max_policy_lag)
            assert lag["steps/trained"] >= PER_UPDATE
            self.lags.append(lag["lag/mean"])
            self.trained += lag["steps/trained"]
            self.dropped += row["lag/dropped_steps"] + lag["steps/dropped"]
            await asyncio.sleep(self.learner_s)
            self.version = update
            await collector.published(update)
            collector.trained(self.scoring_s, self.learner_s)
        for task in [upcoming, *rollouts]:
            task.cancel()
        await asyncio.gather(upcoming, *rollouts, return_exceptions=True)


def simulate(monkeypatch: pytest.MonkeyPatch, updates: int = 40, **times: Any) -> Simulation:
    """Everything after the first updates, in which nothing is measured yet."""
    simulation = Simulation(**times)
    loop = VirtualClock()
    for module in (stream_module, collection, waiting):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=loop.time))
    try:
        loop.run_until_complete(simulation.train(updates))
    finally:
        loop.close()
    simulation.lags, simulation.waits = simulation.lags[5:], simulation.waits[5:]
    return simulation


def shares(simulation: Simulation) -> tuple[float, float, float]:
    """(mean lag, share of steps dropped, the learner's waiting as a share of its work)."""
    return (
        float(np.mean(simulation.lags)),
        simulation.dropped / (simulation.dropped + simulation.trained),
        float(np.mean(simulation.waits)) / simulation.learner_s,
    )


@pytest.mark.parametrize("learner_s", [8.0, 12.0, 30.0])
def test_where_the_learner_is_slower_batches_are_one_version_old_and_in_time(
    monkeypatch: pytest.MonkeyPatch, learner_s: float
) -> None:
    # 192 steps of 32 environments take 2 to 3 s, and their scoring 1 s.
    lag, dropped, waiting_share = shares(simulate(monkeypatch, step_s=0.3, learner_s=learner_s))
    assert lag <= 1.1
    assert dropped <= 0.005
    assert waiting_share < 0.01


def test_where_rollouts_are_slower_they_never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate(monkeypatch, step_s=1.0, learner_s=2.0)
    lag, dropped, _ = shares(simulation)
    assert lag <= 1.1 and dropped <= 0.005
    # 32 environments make 32 steps per second where none waits.
    per_update = np.mean(simulation.waits) + simulation.learner_s
    assert PER_UPDATE / per_update > 0.95 * simulation.environments / simulation.step_s


def test_where_both_are_alike_neither_waits_long_and_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    lag, dropped, waiting_share = shares(simulate(monkeypatch, step_s=0.7, learner_s=6.0))
    assert lag <= 1.5
    assert dropped <= 0.02
    assert waiting_share < 0.1


def test_episodes_that_last_for_many_updates_leave_no_environment_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """An episode takes 60 s, the learner's part of an update 6 s. The first steps of an episode are too old when it
    ends, so rollouts are slower than the learner, whatever their rate of steps."""
    simulation = simulate(monkeypatch, step_s=2.0, learner_s=6.0, lengths=(20, 30, 40))
    per_update = np.mean(simulation.waits) + simulation.learner_s
    made = simulation.environments / simulation.step_s * per_update
    lag, dropped, _ = shares(simulation)
    assert PER_UPDATE / (1 - dropped) > 0.9 * made
    assert lag <= 1.5


@settings(max_examples=200, deadline=None)
@given(
    steps_per_s=st.floats(0, 1e4),
    episode_s=st.floats(0, 1e4),
    preparation_s=st.floats(0, 1e3),
    learner_s=st.floats(0.1, 1e3),
    usable=st.integers(-2, 5),
)
def test_what_is_made_ahead_is_bounded_by_what_may_be_used(
    steps_per_s: float, episode_s: float, preparation_s: float, learner_s: float, usable: int
) -> None:
    pace = Pace(steps_per_s=steps_per_s, episode_s=episode_s, preparation_s=preparation_s, learner_s=learner_s)
    ahead = steps_ahead(pace, 100, usable)
    if usable < 0:
        assert ahead == 100 * usable
    else:
        assert 0 <= ahead <= 100 * (usable + episode_s / learner_s)
    slower = Pace(
        steps_per_s=steps_per_s, episode_s=episode_s, preparation_s=preparation_s, learner_s=2 * learner_s + 1
    )
    assert usable < 0 or steps_ahead(slower, 100, usable) <= ahead or episode_s > learner_s
