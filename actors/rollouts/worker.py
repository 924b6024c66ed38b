"""Rollout workers: Ray actors that drive many environments at once, each environment in a process of its own.

Two ways to drive them. `collect` and `evaluate_batch` move all environments in lock-step with one deterministic batch
of answers per round (sync mode). `start` lets every environment run at its own pace, taking evaluation episodes first
and training episodes otherwise, and streams what is finished (async mode); there, one slow or dead environment holds
up nobody.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.generation import Generation, GenerationRequest
from actors.rollouts.environment_host import EnvironmentFailure, EnvironmentHost
from actors.rollouts.environment_restarts import RestartPolicy
from actors.rollouts.episode import EpisodeRecorder, EpisodeSpec, training_seed
from actors.trajectory import PngEncoder, TrajectoryBatch
from envs.parsing import Parser

logger = logging.getLogger(__name__)

#: Attempts at an evaluation episode whose environment fails, before it is reported as failed.
EVALUATION_ATTEMPTS = 3


@dataclass(frozen=True)
class RolloutOptions:
    """What a worker must know; times in seconds."""

    run: str
    run_seed: int
    environment: str
    environment_kwargs: dict[str, Any]
    slots: int
    temperature: float
    max_new_tokens: int
    environment_deadline_s: float
    environment_start_deadline_s: float
    answer_deadline_s: float
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)


@dataclass
class EvaluationResult:
    """Held-out episodes that were run, and how many could not be because their environments kept failing."""

    episodes: TrajectoryBatch
    failed: int


class RolloutWorker:
    """One Ray actor driving `options.slots` environments. `servers` are policy-server handles; `stream` may be None
    when only the lock-step calls are used."""

    def __init__(self, options: RolloutOptions, worker: int, servers: Sequence[Any], stream: Any | None) -> None:
        self._options = options
        self._worker = worker
        self._servers = list(servers)
        self._stream = stream
        self._encoder = PngEncoder()
        self._hosts = [
            EnvironmentHost(
                options.environment,
                options.environment_kwargs,
                deadline_s=options.environment_deadline_s,
                start_deadline_s=options.environment_start_deadline_s,
                restart_policy=options.restart_policy,
            )
            for _ in range(options.slots)
        ]
        self._failed_slots: set[int] = set()
        self._restarts = 0
        self._failures: Counter[str] = Counter()
        self._evaluations: deque[tuple[EpisodeSpec, asyncio.Future[TrajectoryBatch | None]]] = deque()
        self._evaluation_called = asyncio.Event()
        self._stream_calls: set[asyncio.Task[float]] = set()
        self._slot_tasks: list[asyncio.Task[None]] = []
        self._steps = 0
        self._generate_seconds = 0.0
        self._environment_seconds = 0.0
        self._stream_wait_seconds = 0.0

    async def label_sizes(self) -> tuple[int, ...]:
        """Number of labels of each head of the environment's label space; starts an environment to ask it."""
        host = self._hosts[0]
        if host.pid is None:
            await host.start()
        return tuple(head.size for head in host.label_space.heads)

    async def action_parser(self) -> Parser | None:
        """What reads the environment's utterances, or None; starts an environment to ask it."""
        host = self._hosts[0]
        if host.pid is None:
            await host.start()
        return await host.parser()

    # ---------------------------------------------------------------- lock-step (sync mode)

    async def collect(self, update: int, steps: int) -> TrajectoryBatch:
        """Fresh whole episodes of at least `steps` steps together, moved in lock-step.

        The same update and weights give the same episodes, whatever happened before.
        """
        begun = 0
        finished_steps = 0

        def more(active_steps: int) -> EpisodeSpec | None:
            nonlocal begun
            # Count episodes under way as far as they have come: enough of them are started to reach `steps`, and
            # none when those that run will reach it by themselves.
            if finished_steps + active_steps >= steps:
                return None
            begun += 1
            seed = training_seed(self._options.run_seed, update, self._worker, begun)
            return EpisodeSpec(f"{update}-{self._worker}-{begun}", seed, self._options.temperature)

        batches = []
        async for recorder in self._lock_step(more):
            if len(recorder):
                finished_steps += len(recorder)
                batches.append((recorder.spec.name, recorder.batch()))
        batches.sort(key=lambda item: int(item[0].rsplit("-", 1)[1]))
        return TrajectoryBatch.concatenate(batch for _, batch in batches)

    async def evaluate_batch(self, seeds: Sequence[int], temperature: float) -> EvaluationResult:
        """One held-out episode per seed, moved in lock-step."""
        waiting = deque(EpisodeSpec(f"evaluation-{seed}", seed, temperature) for seed in seeds)
        attempts: Counter[int] = Counter()
        done: dict[int, TrajectoryBatch] = {}
        failed = 0
        async for recorder in self._lock_step(lambda _: waiting.popleft() if waiting else None):
            seed = recorder.spec.seed
            if not recorder.failed:
                done[seed] = recorder.batch()
            elif (attempts.update([seed]) or attempts[seed]) < EVALUATION_ATTEMPTS:
                waiting.append(recorder.spec)
            else:
                failed += 1
        return EvaluationResult(TrajectoryBatch.concatenate(done[s] for s in seeds if s in done), failed)

    async def _lock_step(self, next_spec: Any) -> Any:
        """Run episodes in rounds: every active environment's request in one batch, then every step at once.

        `next_spec(active_steps)` gives the next episode, or None to start no more now. Yields each finished recorder.
        """
        server = self._servers[self._worker % len(self._servers)]
        active: dict[int, EpisodeRecorder] = {}
        while True:
            usable = [slot for slot, host in enumerate(self._hosts) if not host.quarantined]
            beginning: dict[int, EpisodeRecorder] = {}
            for slot in usable or range(self._options.slots):
                if slot in active:
                    continue
                under_way = [*active.values(), *beginning.values()]
                spec = next_spec(sum(len(recorder) + 1 for recorder in under_way))
                if spec is not None:
                    beginning[slot] = self._recorder(spec, slot)
            begun = await asyncio.gather(*(self._begin(recorder, slot) for slot, recorder in beginning.items()))
            for (slot, recorder), running in zip(beginning.items(), begun, strict=True):
                if running:
                    active[slot] = recorder
                else:
                    yield recorder
            if not beginning and not active:
                return
            slots = sorted(active)
            requests = [active[slot].request() for slot in slots]
            answers = await self._ask_batch(server, requests)
            await asyncio.gather(
                *(self._step(active[slot], slot, answer) for slot, answer in zip(slots, answers, strict=True))
            )
            for slot in slots:
                if active[slot].over:
                    yield active.pop(slot)

    # ---------------------------------------------------------------- free-running (async mode)

    async def start(self, update: int) -> None:
        """Let every environment run and stream finished training episodes until `stop`; `update` seeds them."""
        if self._slot_tasks:
            return
        self._slot_tasks = [
            asyncio.create_task(self._run_slot(slot, self._training_specs(update, slot)))
            for slot in range(self._options.slots)
        ]

    async def evaluate(self, seeds: Sequence[int], temperature: float) -> EvaluationResult:
        """One held-out episode per seed, taken up by environments as they become free, ahead of training."""
        futures = []
        for seed in seeds:
            future: asyncio.Future[TrajectoryBatch | None] = asyncio.get_running_loop().create_future()
            self._evaluations.append((EpisodeSpec(f"evaluation-{seed}", seed, temperature), future))
            futures.append(future)
        self._evaluation_called.set()
        everything = asyncio.gather(*futures)
        waiting: set[asyncio.Future[Any]] = {everything, *self._slot_tasks}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            everything.cancel()
            await self.status()  # raises what ended an environment's loop
        batches = await everything
        kept = [batch for batch in batches if batch is not None]
        return EvaluationResult(TrajectoryBatch.concatenate(kept), len(batches) - len(kept))

    def _training_specs(self, update: int, slot: int) -> Iterator[EpisodeSpec]:
        count = 0
        while True:
            seed = training_seed(self._options.run_seed, update, self._worker, slot, count)
            # The process id tells a restarted worker's episodes from those of the one that died.
            name = f"{update}-{self._worker}-{slot}-{count}-{os.getpid()}"
            yield EpisodeSpec(name, seed, self._options.temperature)
            count += 1

    async def _run_slot(self, slot: int, training: Iterator[EpisodeSpec]) -> None:
        """Episode after episode, each begun when the stream lets it. While it does not, the environment is still there
        for evaluation (which would otherwise wait for a learner that waits for it)."""
        assert self._stream is not None
        environment = f"{self._worker}-{slot}"
        leave = self._ask_stream(self._stream.begin, environment)
        while True:
            if self._evaluations:
                await self._run_evaluation(slot)
            elif not leave.done():
                self._evaluation_called.clear()
                call: asyncio.Future[Any] = asyncio.ensure_future(self._evaluation_called.wait())
                waiting: set[asyncio.Future[Any]] = {leave, call}
                try:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    call.cancel()
            else:
                self._stream_wait_seconds += leave.result()
                recorder = await self._run_episode(next(training), slot)
                if len(recorder):
                    leave = self._ask_stream(self._stream.put, environment, recorder.batch())
                else:
                    leave = self._ask_stream(self._stream.begin, environment)

    def _ask_stream(self, method: Any, *arguments: Any) -> asyncio.Task[float]:
        """A call of the stream under way; its result is the seconds waited until the next episode may begin."""

        async def call() -> float:
            return await method.remote(*arguments)

        asked = asyncio.create_task(call())
        self._stream_calls.add(asked)
        asked.add_done_callback(self._stream_calls.discard)
        return asked

    async def _run_evaluation(self, slot: int) -> None:
        """The next evaluation episode, tried again where its environment fails."""
        spec, future = self._evaluations.popleft()
        for _ in range(EVALUATION_ATTEMPTS):
            recorder = await self._run_episode(spec, slot)
            if not recorder.failed:
                break
        if not future.done():
            future.set_result(None if recorder.failed else recorder.batch())

    async def _run_episode(self, spec: EpisodeSpec, slot: int) -> EpisodeRecorder:
        recorder = self._recorder(spec, slot)
        if await self._begin(recorder, slot):
            while not recorder.over:
                await self._step(recorder, slot, await self._ask(slot, recorder.request(seeded=False)))
        return recorder

    # ---------------------------------------------------------------- shared

    def _recorder(self, spec: EpisodeSpec, slot: int) -> EpisodeRecorder:
        options = self._options
        return EpisodeRecorder(
            spec,
            run=options.run,
            run_seed=options.run_seed,
            environment=options.environment,
            worker=self._worker,
            slot=slot,
            max_new_tokens=options.max_new_tokens,
            encoder=self._encoder,
        )

    async def _begin(self, recorder: EpisodeRecorder, slot: int) -> bool:
        """Reset the slot's environment, starting it first where it does not run; False when it failed."""
        host = self._hosts[slot]
        try:
            if host.pid is None:
                await host.ensure_running()
                self._restarts += slot in self._failed_slots
                self._failed_slots.discard(slot)
            observation, _ = await host.reset(recorder.spec.seed)
        except EnvironmentFailure as failure:
            self._note_failure(recorder, slot, failure)
            return False
        recorder.begin(observation)
        return True

    async def _step(self, recorder: EpisodeRecorder, slot: int, answer: Generation) -> None:
        started = time.monotonic()
        try:
            outcome = await self._hosts[slot].step(answer.text)
        except EnvironmentFailure as failure:
            self._note_failure(recorder, slot, failure)
            return
        seconds = time.monotonic() - started
        self._steps += 1
        self._environment_seconds += seconds
        self._generate_seconds += answer.seconds
        recorder.record(answer, outcome, seconds)

    def _note_failure(self, recorder: EpisodeRecorder, slot: int, failure: EnvironmentFailure) -> None:
        logger.warning("slot %d: %s", slot, failure)
        self._failures[failure.reason] += 1
        self._failed_slots.add(slot)
        recorder.fail(f"environment_{failure.reason}")

    async def _ask(self, slot: int, request: GenerationRequest) -> Generation:
        """One answer from the slot's server; while that one is down, from the next."""
        first = self._worker * self._options.slots + slot
        return await self._with_failover(first, lambda server: server.generate.remote(request))

    async def _ask_batch(self, server: Any, requests: list[GenerationRequest]) -> list[Generation]:
        first = self._servers.index(server)
        return await self._with_failover(first, lambda chosen: chosen.generate_batch.remote(requests))

    async def _with_failover(self, first: int, call: Any) -> Any:
        """Ask servers in turn from `first` on until one answers; a dead one is being restarted meanwhile."""
        deadline = time.monotonic() + self._options.answer_deadline_s
        attempt = 0
        while True:
            server = self._servers[(first + attempt) % len(self._servers)]
            left = deadline - time.monotonic()
            try:
                # asyncio.wait_for would lose a cancellation that comes together with the answer (Python 3.11).
                async with asyncio.timeout(max(left, 0.1)):
                    return await call(server)
            except (RayActorError, TimeoutError, RayTaskError) as error:
                # A server that is alive and says what is wrong with the request would say it again; one that was too
                # busy to answer in time might not.
                if isinstance(error, RayTaskError) and not isinstance(error, TimeoutError):
                    raise
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"no policy server answered rollout worker {self._worker} within "
                        f"{self._options.answer_deadline_s:.0f} s (policy_server.generate_deadline_s and "
                        f"start_deadline_s together); last error: {error}"
                    ) from error
                attempt += 1
                await asyncio.sleep(0.2)

    async def status(self) -> dict[str, Any]:
        """Process id, whether it is free-running, counts since it started and its memory in bytes.

        Raises what stopped a free-running environment's loop, so that it is seen and not only logged.
        """
        for task in self._slot_tasks:
            if task.done():
                task.result()
        return {
            "pid": os.getpid(),
            "running": bool(self._slot_tasks),
            "steps": self._steps,
            "failures": dict(self._failures),
            "restarts": self._restarts,
            "quarantined": sum(host.quarantined for host in self._hosts),
            "generate_seconds": self._generate_seconds,
            "environment_seconds": self._environment_seconds,
            "stream_wait_seconds": self._stream_wait_seconds,
            "environment_pids": [host.pid for host in self._hosts if host.pid],
            "rss_bytes": psutil.Process().memory_info().rss,
        }

    async def stop(self) -> None:
        """Stop the free-running loops and end the environment processes."""
        ending = [*self._slot_tasks, *self._stream_calls]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._slot_tasks = []
        while self._evaluations:
            self._evaluations.popleft()[1].cancel()
        await asyncio.gather(*(host.close() for host in self._hosts))


def make_rollout_worker(cpus: float, resources: dict[str, float], *arguments: Any) -> Any:
    """Start a `RolloutWorker` as a Ray actor that Ray restarts when it dies; `arguments` as for the class.

    resources: custom resources it takes, for instance {"emulator": 8.0}.
    """
    options = {"num_cpus": cpus, "resources": resources, "max_restarts": -1, "max_concurrency": 1000}
    return ray.remote(RolloutWorker).options(**options).remote(*arguments)
