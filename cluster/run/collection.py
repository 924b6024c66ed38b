"""Collect the batch of an update from the rollout workers: in lock-step (sync) or from the stream (async)."""

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

#: Timeout of one request to the stream, after which the deadline is checked, seconds.
STREAM_POLL_S = 5.0
#: Attempts of a call to a rollout worker that dies and is restarted.
WORKER_ATTEMPTS = 5


class Collector(Protocol):
    """What the controller needs from either mode."""

    #: Whether the next batch may be collected while the learner trains on this one.
    overlaps: bool

    async def collect(self, update: int) -> tuple[TrajectoryBatch, dict[str, float]]:
        """Collect whole episodes with at least `training.steps_per_update` steps for update `update`; returns them
        and metrics of the collection."""
        ...

    async def published(self, version: int) -> None:
        """The controller calls this after the policy servers have loaded `version`."""
        ...

    async def evaluate(self, seeds: Sequence[int], temperature: float) -> EvaluationResult:
        """Play one held-out episode per seed; returns them in the order of the seeds."""
        ...


class SynchronousCollector:
    """Every worker collects its share in lock-step; nothing overlaps, and the seed determines the result."""

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
        pass  # the next `collect` uses the new version

    async def evaluate(self, seeds: Sequence[int], temperature: float) -> EvaluationResult:
        results = await _from_workers(
            self._workers,
            lambda index, worker: worker.evaluate_batch.remote(_share(seeds, index, self._workers), temperature),
            self._config.rollout.stall_deadline_s,
            "evaluation (rollout.stall_deadline_s)",
        )
        return _merge(results, seeds)


class StreamCollector:
    """Takes finished episodes from the stream that the workers fill continuously.

    Steps sampled with version v may be trained on up to update v + 1 + `max_policy_lag`. So while the batch of update u
    is collected, workers may sample steps for this update and for v + 1 + `max_policy_lag` - u later ones. Further
    steps would be too old when their turn comes.
    """

    overlaps = True

    def __init__(self, config: RunConfig, workers: Sequence[Any], stream: Any) -> None:
        self._config = config
        self._workers = workers
        self._stream = stream
        self._update = 0  # the update whose batch was collected last, or is being collected
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
        # A resumed run first publishes `version`; the batches up to it were collected before.
        updates = self._version + 1 + self._config.max_policy_lag - max(self._update, self._version)
        ahead = updates * self._config.training.steps_per_update
        await answer(self._stream.allow.remote(ahead), 60.0, "the stream")

    async def _stall_message(self, missing: int) -> str:
        status = await answer(self._stream.status.remote(), 60.0, "the stream's status")
        workers = await answers([worker.status.remote() for worker in self._workers], 60.0, "the workers' status")
        failures = [worker["failures"] for worker in workers if worker["failures"]]
        return (
            f"the rollouts produced no batch within {self._config.rollout.stall_deadline_s:.0f} s "
            f"(rollout.stall_deadline_s): {missing} steps missing, {status['steps']} waiting, the last episode came "
            f"{status['idle_seconds']:.0f} s ago; environment failures by worker: {failures or 'none'}"
        )


def drop_stale(batch: TrajectoryBatch, oldest_version: int) -> TrajectoryBatch:
    """The episodes whose tokens were all sampled by `oldest_version` or later."""
    versions = batch.behaviour_versions()
    fresh = [piece for piece in batch.episode_slices() if versions[piece].min() >= oldest_version]
    if len(fresh) == len(batch.episode_slices()):
        return batch
    return TrajectoryBatch.concatenate(
        TrajectoryBatch(batch.steps.slice(piece.start, piece.stop - piece.start), batch.images) for piece in fresh
    )


async def _from_workers(workers: Sequence[Any], call: Any, deadline_s: float, what: str) -> list[Any]:
    """Call every worker; if one dies, call it again after Ray has restarted it."""

    async def one(index: int, worker: Any) -> Any:
        for attempt in range(WORKER_ATTEMPTS):
            try:
                return await answer(call(index, worker), deadline_s, f"rollout worker {index}: {what}")
            except RayActorError as error:
                if isinstance(error, RayTaskError):
                    raise  # the worker is alive; another actor's death made the call fail
                if attempt == WORKER_ATTEMPTS - 1:
                    raise CosoError(f"rollout worker {index} died {WORKER_ATTEMPTS} times: {what}") from None
                await asyncio.sleep(0.5)
        return None

    return list(await asyncio.gather(*(one(index, worker) for index, worker in enumerate(workers))))


def _share(seeds: Sequence[int], index: int, workers: Sequence[Any]) -> list[int]:
    return list(seeds[index :: len(workers)])


def _merge(results: Sequence[EvaluationResult], seeds: Sequence[int]) -> EvaluationResult:
    """Join the workers' episodes in the order of the seeds, so that the result does not depend on the shares."""
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
