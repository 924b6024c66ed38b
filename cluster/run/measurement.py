"""`coso plan --measure`: the rates of a run's stages, each measured alone, in about a minute.

A whole system is started as for `mode: sync` and makes updates on a model that is thrown away: one environment alone,
then all of them, then scoring, update and publishing. The first round warms everything up and does not count. Other
programs on the machine count as if they were the run's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from actors.rollouts.episode import EVALUATION_SEED_BASE
from actors.trajectory import TrajectoryBatch
from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.placement import Kind
from cluster.launch.prediction import Rates
from cluster.run.run_folder import Progress, RunFolder
from cluster.run.system import System

#: How long rounds are begun, seconds, and how many are made at least, the first one included.
MEASURE_S, LEAST_ROUNDS = 60.0, 3


@dataclass
class _Samples:
    """What each round gave, by the names of `Rates`' fields; core-seconds by kind of actor."""

    of: dict[str, list[float]] = field(default_factory=dict)
    cores: dict[Kind, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.of.setdefault(name, []).append(value)

    def rates(self) -> Rates:
        """The medians of all rounds but the first."""
        values: dict[str, Any] = {name: median(samples[1:]) for name, samples in self.of.items()}
        return Rates(**values, core_s={kind: median(samples[1:]) for kind, samples in self.cores.items()})


async def measure_rates(config: RunConfig, folder: Path, temporary: Path, console: Any) -> Rates:
    """Measure in the Ray that runs. folder: for a run folder that is thrown away. Core-seconds are measured only where
    all actors run on this machine. Raises what a run raises."""
    values = config.model_dump()
    values |= {"mode": "sync", "name": "measure", "folder": str(folder)}
    config = validate(values)
    run = RunFolder.create(config, overwrite=True)
    try:
        system = await System.start(config, run, Progress(), temporary, console)
        try:
            return await system.supervisor.guard(_rounds(system, console))
        finally:
            await system.close()
    finally:
        run.unlock()


async def _rounds(system: System, console: Any) -> Rates:
    samples = _Samples()
    here = len({*system.places.plan.placed.values()}) == 1
    started, update = time.monotonic(), 0
    while update < LEAST_ROUNDS or time.monotonic() - started < MEASURE_S:
        update += 1
        console.stage(f"measuring, round {update}")
        batch = await _rollouts(system, samples, update, here)
        await asyncio.to_thread(system.learner.prepare, batch, update - 1)  # images, beside the scoring as in a run
        batch = await _scoring(system, samples, batch, update, here)
        await _learning(system, samples, batch, update, here)
    return samples.rates()


async def _rollouts(system: System, samples: _Samples, update: int, here: bool) -> TrajectoryBatch:
    """One environment alone, then all of them."""
    config = system.config
    began = time.monotonic()
    alone = (await system.collector.evaluate([EVALUATION_SEED_BASE + update], config.rollout.temperature)).episodes
    first_s = _mean(alone, "generate_seconds")
    environment_s = max(0.0, (time.monotonic() - began) / len(alone) - first_s)  # resets and messages, too
    engines = [pid for status in await system.server_statuses() for pid in (status["pid"], *status["engine_pids"])]
    served, began, machine = _cpu_seconds(engines) if here else 0.0, time.monotonic(), _machine_seconds()
    batch, _ = await system.collector.collect(update)
    wall, machine = time.monotonic() - began, _machine_seconds() - machine
    environments = config.rollout.workers * config.rollout.envs_per_worker
    at_once = environments / config.policy_server.replicas
    answer_s = max(first_s, _mean(batch, "generate_seconds"))
    samples.add(
        environment_s=environment_s,
        first_answer_s=first_s,
        # Where only one asks, what a second one would add is not known: as much as the first is the cautious guess.
        further_answer_s=(answer_s - first_s) / (at_once - 1) if at_once > 1 else first_s,
        lock_step=min(1.0, len(batch) / wall * (environment_s + answer_s) / environments),
    )
    if here:
        served = _cpu_seconds(engines) - served
        samples.cores.setdefault("policy server", []).append(served / len(batch))
        samples.cores.setdefault("rollout worker", []).append(max(0.0, machine - served) / len(batch))
    return batch


async def _scoring(
    system: System, samples: _Samples, batch: TrajectoryBatch, update: int, here: bool
) -> TrajectoryBatch:
    config = system.config
    if not config.entropy.needs_influence:
        return batch
    with _cores(samples, "scorer", len(batch), here) as clock, system.waiting_for_scores():
        batch, row = await asyncio.to_thread(system.score, batch, update, False)
    busy = row["time/scorers_busy"]
    samples.add(scorer_s=busy / len(batch), scm_training_s=max(0.0, clock() - busy / config.scoring.workers))
    return batch


async def _learning(system: System, samples: _Samples, batch: TrajectoryBatch, update: int, here: bool) -> None:
    config = system.config
    with _cores(samples, "learner rank", len(batch), here) as clock:
        await system.in_learners_turn(lambda: system.learner.update(batch, update - 1))
        trained = clock()
        if config.weight_sync.check_every:
            system.probe_with(batch)
        async with system.between_versions:
            await system.publish(update)
        if config.weight_sync.check_every:
            await system.check_sync(update)
    samples.add(rank_s=trained * config.learner.ranks / len(batch), publish_s=clock() - trained)


@contextmanager
def _cores(samples: _Samples, kind: Kind, steps: int, here: bool) -> Iterator[Any]:
    """Counts the machine's core-seconds in the block for a kind of actor; yields a clock of the block's seconds."""
    started, machine = time.monotonic(), _machine_seconds()
    yield lambda: time.monotonic() - started
    if here:
        samples.cores.setdefault(kind, []).append((_machine_seconds() - machine) / steps)


def _machine_seconds() -> float:
    """CPU seconds that this machine has worked since it started, all cores and programs together."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def _cpu_seconds(pids: list[int]) -> float:
    """CPU seconds that processes of this machine have worked; of one that has ended, none."""
    total = 0.0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


def _mean(batch: TrajectoryBatch, column: str) -> float:
    if not len(batch):
        raise CosoError("an environment failed while it was measured; `coso check` with its id says why")
    return float(np.mean(batch.column(column)))
