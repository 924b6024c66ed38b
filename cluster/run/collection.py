"""Getting the batch of one update from the rollout workers: in lock-step (sync) or from the stream (async)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayTaskError

from actors.rollouts.worker import EvaluationResult
from actors.trajectory import TrajectoryBatch
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError, DeadlineExceeded
from cluster.run.waiting import answer, answers

#: How long one ask of the stream waits before looking at the workers again, seconds.
STREAM_POLL_S = 5.0
#: Times a call to a rollout worker that died is handed to its restarted self.
WORKER_ATTEMPTS = 5


class Collector(Protocol):
    """What the controller asks of either mode."""

    #: Whether the next batch may be collected while the learner is busy with this one.
    overlaps: bool

    async def collect(self, update: int) -> tuple[TrajectoryBatch, dict[str, float]]:
        """Whole episodes of at least `training.steps_per_update` steps to make policy version `update` from, and
        metrics of how they came."""
        ...

    async def published(self, version: int) -> None:
        """To be told of every version that the policy servers have come to serve."""
        ...

    async def evaluate(self, seeds: Sequence[int], temperature: float) -> EvaluationResult:
        """One held-out episode per seed, in the order of the seeds."""
        ...


class SynchronousCollector:
    """Every worker collects its share in lock-step; nothing overlaps, and a seed fixes everything."""

    overlaps = False

    def __init__(self, config: RunConfig, workers: Sequence[Any]) -> None:
        self._config = config
        self._workers = workers

    async def collect(self, update: int) -> tuple[TrajectoryBatch, dict[str, float]]:
        share = -(-self._config.training.steps_per_update // len(self._workers))
        batches = await _from_workers(
            self._workers,
            lambda _, worker: worker.collect.remote(update, share),
            self._config.rollout.stall_deadline_s,
            f"collecting {share} steps per rollout worker (rollout.stall_deadline_s)",
        )
        return TrajectoryBatch.concatenate(batches), {}

    async def published(self, version: int) -> None:
        pass  # lock-step: the next `collect` finds it

    async def evaluate(self, seeds: Sequence[int], temperature: float) -> EvaluationResult:
        results = await _from_workers(
            self._workers,
            lambda index, worker: worker.evaluate_batch.remote(_share(seeds, index, self._workers), temperature),
            self._config.rollout.stall_deadline_s,
            "evaluation (rollout.stall_deadline_s)",
        )
        return _merge(results, seeds)


class StreamCollector:
    """Takes finished episodes from the stream that free-running workers fill.

    What is made under version v may be trained on up to update v + 1 + `max_policy_lag`. So while the batch of update u
    is collected, steps are made for that one and those of v + 1 + `max_policy_lag` - u updates more; what went beyond
    would be dropped.
    """

    overlaps = True

    def __init__(self, config: RunConfig, workers: Sequence[Any], stream: Any) -> None:
        self._config = config
        self._workers = workers
        self._stream = stream
        self._update = 0  # whose batch was collected, or is being
        self._version = 0

    async def collect(self, update: int) -> tuple[TrajectoryBatch, dict[str, float]]:
        self._update = update
        await self._allow()
        wanted = self._config.training.steps_per_update
        oldest = update - 1 - self._config.max_policy_lag
        kept: list[TrajectoryBatch] = []
        stale = 0
        deadline = time.monotonic() + self._config.rollout.stall_deadline_s
        while (missing := wanted - sum(map(len, kept))) > 0:
            taken = await answer(self._stream.take.remote(missing, STREAM_POLL_S), STREAM_POLL_S + 60.0, "the stream")
            if taken is None:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(await self._stall_message(missing))
                continue
            fresh = drop_stale(taken, oldest)
            stale += len(taken) - len(fresh)
            kept.append(fresh)
        status = await answer(self._stream.status.remote(), 60.0, "the stream's status")
        return TrajectoryBatch.concatenate(kept), {
            "lag/dropped_steps": stale,
            "queue/steps": status["steps"],
            "queue/episodes": status["episodes"],
            "queue/bytes": status["bytes"],
            "memory/stream_mb": status["rss_bytes"] / 2**20,
        }

    async def evaluate(self, seeds: Sequence[int], temperature: float) -> EvaluationResult:
        results = await _from_workers(
            self._workers,
            lambda index, worker: worker.evaluate.remote(_share(seeds, index, self._workers), temperature),
            self._config.rollout.stall_deadline_s,
            "evaluation (rollout.stall_deadline_s)",
        )
        return _merge(results, seeds)

    async def published(self, version: int) -> None:
        self._version = version
        await self._allow()

    async def _allow(self) -> None:
        # Of a resumed run, which begins with publishing, the batches up to `version` were collected before.
        updates = self._version + 1 + self._config.max_policy_lag - max(self._update, self._version)
        ahead = updates * self._config.training.steps_per_update
        await answer(self._stream.allow.remote(ahead), 60.0, "the stream")

    async def _stall_message(self, missing: int) -> str:
        status = await answer(self._stream.status.remote(), 60.0, "the stream's status")
        workers = await answers([worker.status.remote() for worker in self._workers], 60.0, "the workers' status")
        failures = [worker["failures"] for worker in workers if worker["failures"]]
        return (
            f"rollouts gave no batch within {self._config.rollout.stall_deadline_s:.0f} s "
            f"(rollout.stall_deadline_s): {missing} steps missing, {status['steps']} waiting, the last episode came "
            f"{status['idle_seconds']:.0f} s ago; environment failures by worker: {failures or 'none'}"
        )


def drop_stale(batch: TrajectoryBatch, oldest_version: int) -> TrajectoryBatch:
    """The episodes all of whose tokens were made by `oldest_version` or later."""
    versions = batch.behaviour_versions()
    fresh = [piece for piece in batch.episode_slices() if versions[piece].min() >= oldest_version]
    if len(fresh) == len(batch.episode_slices()):
        return batch
    return TrajectoryBatch.concatenate(
        TrajectoryBatch(batch.steps.slice(piece.start, piece.stop - piece.start), batch.images) for piece in fresh
    )


async def _from_workers(workers: Sequence[Any], call: Any, deadline_s: float, what: str) -> list[Any]:
    """Call every worker; one that dies is asked again once Ray has restarted it."""

    async def one(index: int, worker: Any) -> Any:
        for attempt in range(WORKER_ATTEMPTS):
            try:
                return await answer(call(index, worker), deadline_s, f"rollout worker {index}: {what}")
            except RayActorError as error:
                if isinstance(error, RayTaskError):
                    raise  # the worker lives; it was another actor's death that it could not get over
                if attempt == WORKER_ATTEMPTS - 1:
                    raise CosoError(f"rollout worker {index} died {WORKER_ATTEMPTS} times: {what}") from None
                await asyncio.sleep(0.5)
        return None

    return list(await asyncio.gather(*(one(index, worker) for index, worker in enumerate(workers))))


def _share(seeds: Sequence[int], index: int, workers: Sequence[Any]) -> list[int]:
    return list(seeds[index :: len(workers)])


def _merge(results: Sequence[EvaluationResult], seeds: Sequence[int]) -> EvaluationResult:
    """The workers' episodes in the order of the seeds, so that a report does not depend on how they were shared out."""
    episodes = {
        int(result.episodes.column("seed")[piece.start]): TrajectoryBatch(
            result.episodes.steps.slice(piece.start, piece.stop - piece.start), result.episodes.images
        )
        for result in results
        for piece in result.episodes.episode_slices()
    }
    return EvaluationResult(
        TrajectoryBatch.concatenate(episodes[seed] for seed in seeds if seed in episodes),
        sum(result.failed for result in results),
    )
