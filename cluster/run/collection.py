"""Collect the batch of an update from the rollout workers: in lock-step (sync) or from the stream (async)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayTaskError

from actors.rollouts.worker import EvaluationResult
from actors.trajectory import TrajectoryBatch
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError, DeadlineExceeded
from cluster.run.pacing import Pace, steps_ahead
from cluster.run.waiting import answer, while_progressing

#: Timeout of one request to the stream, after which it is asked again, seconds.
STREAM_POLL_S = 5.0
#: Longest wait for the status of a stream or a worker, seconds.
STATUS_DEADLINE_S = 60.0
#: Updates whose median time predicts that of the next.
RECENT_UPDATES = 5
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

    def trained(self, preparation_s: float, learner_s: float) -> None:
        """The controller calls this after every update: seconds between the collection of its batch and the batch being
        ready for the learner, and of the update without waiting for the batch."""
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
            self._config.rollout.silence_deadline_s,
            f"collecting {share} steps",
        )
        return TrajectoryBatch.concatenate(batches), {}

    async def published(self, version: int) -> None:
        pass  # the next `collect` uses the new version

    def trained(self, preparation_s: float, learner_s: float) -> None:
        pass  # nothing is made ahead

    async def evaluate(self, seeds: Sequence[int], temperature: float) -> EvaluationResult:
        results = await _from_workers(
            self._workers,
            lambda index, worker: worker.evaluate_batch.remote(_share(seeds, index, self._workers), temperature),
            self._config.rollout.silence_deadline_s,
            "evaluation",
        )
        return _merge(results, seeds)


class StreamCollector:
    """Takes finished episodes from the stream that the workers fill continuously.

    A step sampled with version v may be trained on up to update v + 1 + `max_policy_lag`. In an older step the learner
    sees context only, so an episode is kept as long as one of its steps is fresh enough, and a batch is complete when
    it has `training.steps_per_update` fresh steps. What is made ahead of the batch being collected is what
    `steps_ahead` predicts to be used next, and never more than updates up to v + 1 + `max_policy_lag` can use.
    """

    overlaps = True

    def __init__(self, config: RunConfig, workers: Sequence[Any], stream: Any) -> None:
        self._config = config
        self._workers = workers
        self._stream = stream
        self._update = 0  # the update whose batch was collected last, or is being collected
        self._version = 0
        self._dropped = 0.0  # steps, up to the batch collected last
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT_UPDATES)  # seconds: preparation, learner

    async def collect(self, update: int) -> tuple[TrajectoryBatch, dict[str, float]]:
        self._update = update
        await self._allow()
        limit, what = (
            self._config.rollout.silence_deadline_s,
            f"the batch of update {update} (rollout.silence_deadline_s)",
        )
        try:
            batch = await while_progressing(self._take(update), self._progress, limit, what)
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"{error}; {await self._state()}") from None
        status = await self._stream_status()
        dropped = status["dropped_steps"] - self._dropped
        self._dropped = status["dropped_steps"]
        return batch, {
            "lag/dropped_steps": dropped,
            "queue/steps": status["steps"],
            "queue/episodes": status["episodes"],
            "queue/bytes": status["bytes"],
            "memory/stream_mb": status["rss_bytes"] / 2**20,
        }

    async def evaluate(self, seeds: Sequence[int], temperature: float) -> EvaluationResult:
        results = await _from_workers(
            self._workers,
            lambda index, worker: worker.evaluate.remote(_share(seeds, index, self._workers), temperature),
            self._config.rollout.silence_deadline_s,
            "evaluation",
        )
        return _merge(results, seeds)

    async def published(self, version: int) -> None:
        self._version = version
        await self._allow()

    def trained(self, preparation_s: float, learner_s: float) -> None:
        self._recent.append((preparation_s, learner_s))

    @property
    def _usable_updates(self) -> int:
        """Updates after the one being collected that may still use what the present weights make."""
        # A resumed run first publishes `version`; the batches up to it were collected before.
        return self._version + 1 + self._config.max_policy_lag - max(self._update, self._version)

    async def _allow(self) -> None:
        """Let the stream admit what will be used next. Before the first update is done, only the present batch."""
        usable, per_update = self._usable_updates, self._config.training.steps_per_update
        ahead = min(usable, 0) * per_update
        if self._recent:
            status = await self._stream_status()
            preparation, learner = zip(*self._recent, strict=True)
            pace = Pace(
                steps_per_s=status["steps_per_s"],
                episode_s=status["episode_seconds"],
                preparation_s=median(preparation),
                learner_s=median(learner),
            )
            ahead = steps_ahead(pace, per_update, usable)
        await answer(self._stream.allow.remote(ahead), STATUS_DEADLINE_S, "the stream")

    async def _take(self, update: int) -> TrajectoryBatch:
        wanted, oldest = self._config.training.steps_per_update, update - 1 - self._config.max_policy_lag
        while True:
            call = self._stream.take.remote(wanted, STREAM_POLL_S, oldest)
            taken = await answer(call, STREAM_POLL_S + STATUS_DEADLINE_S, "the stream")
            if taken is not None:
                return taken

    async def _progress(self) -> Any:
        """Steps that the workers have made. While they have to wait for the learner's next version, a value that is
        never the same: their silence says nothing then."""
        return time.monotonic() if self._usable_updates < 0 else await _steps_made(self._workers)

    async def _stream_status(self) -> dict[str, float]:
        return await answer(self._stream.status.remote(), STATUS_DEADLINE_S, "the stream's status")

    async def _state(self) -> str:
        status = await self._stream_status()
        workers = [found for found in await worker_statuses(self._workers) if found is not None]
        failures = [worker["failures"] for worker in workers if worker["failures"]]
        return (
            f"{status['steps']} of {self._config.training.steps_per_update} steps are there, the last episode ended "
            f"{status['idle_seconds']:.0f} s ago; environment failures by worker: {failures or 'none'}"
        )


async def _from_workers(workers: Sequence[Any], call: Any, silence_s: float, what: str) -> list[Any]:
    """Call every worker; if one dies, call it again after Ray has restarted it. Raises `DeadlineExceeded` where one
    works on without making a step for `silence_s` seconds."""

    async def one(index: int, worker: Any) -> Any:
        for attempt in range(WORKER_ATTEMPTS):
            try:
                return await while_progressing(
                    _answer_of(call(index, worker)),
                    lambda: _steps_made([worker]),
                    silence_s,
                    f"rollout worker {index}, {what} (rollout.silence_deadline_s)",
                )
            except RayActorError as error:
                if isinstance(error, RayTaskError):
                    raise  # the worker is alive; another actor's death made the call fail
                if attempt == WORKER_ATTEMPTS - 1:
                    raise CosoError(f"rollout worker {index} died {WORKER_ATTEMPTS} times: {what}") from None
                await asyncio.sleep(0.5)
        return None

    return list(await asyncio.gather(*(one(index, worker) for index, worker in enumerate(workers))))


async def _answer_of(reference: Any) -> Any:
    return await reference


async def worker_statuses(workers: Sequence[Any]) -> list[dict[str, Any] | None]:
    """The status of every worker; None of one that does not answer, for instance while Ray restarts it."""

    async def one(index: int, worker: Any) -> dict[str, Any] | None:
        try:
            return await answer(worker.status.remote(), STATUS_DEADLINE_S, f"the status of rollout worker {index}")
        except (RayActorError, DeadlineExceeded) as error:
            if isinstance(error, RayTaskError):
                raise
            return None

    return list(await asyncio.gather(*(one(index, worker) for index, worker in enumerate(workers))))


async def _steps_made(workers: Sequence[Any]) -> list[int]:
    """Steps that each worker's environments have made since it started; −1 while it does not answer."""
    return [-1 if status is None else status["steps"] for status in await worker_statuses(workers)]


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
