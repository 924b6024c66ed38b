"""Rollout workers: Ray actors that drive many environments at once, each environment in a process of its own.

There are two ways to drive them. In sync mode, `collect` and `evaluate_batch` move all environments in lock-step, with
one deterministic batch of answers per round. In async mode, `start` lets every environment run at its own pace. It
takes evaluation episodes first, training episodes otherwise, and streams each finished episode. There, a slow or dead
environment delays no other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray

from actors.generation import Generation, Refusal
from actors.rollouts.environment_host import EnvironmentFailure, EnvironmentHost
from actors.rollouts.episode import EVALUATION_SEED_BASE, EpisodeRecorder, EpisodeSpec, training_seed
from actors.rollouts.failed_episodes import FailedEpisodes
from actors.rollouts.policy_client import PolicyClient
from actors.settings import RolloutSettings
from actors.trajectory import TrajectoryBatch
from envs.parsing import Parser
from envs.settings import EnvironmentSettings

logger = logging.getLogger(__name__)

#: How often an evaluation episode is tried when its environment fails, before it is reported as failed.
EVALUATION_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class RolloutLaunch:
    """What the run tells a worker beside its settings."""

    run: str  # the run's name
    run_seed: int
    worker: int  # index of this worker
    answer_deadline_s: float  # longest silence of a server: `PolicyServerSettings.answer_deadline_s`


@dataclass
class EvaluationResult:
    """Held-out episodes, and the number of those that failed because their environments failed again and again."""

    episodes: TrajectoryBatch
    failed: int


class RolloutWorker:
    """One Ray actor that drives `rollout.envs_per_worker` environments, each in a slot of its own."""

    def __init__(
        self,
        environment: EnvironmentSettings,
        rollout: RolloutSettings,
        launch: RolloutLaunch,
        servers: Sequence[Any],
        stream: Any | None,
    ) -> None:
        """servers: handles of the policy servers. stream: handle of the `TrajectoryStream`; None where only the
        lock-step calls are used."""
        self._rollout = rollout
        self._launch = launch
        self._policy = PolicyClient(servers, launch.answer_deadline_s, f"rollout worker {launch.worker}")
        self._stream = stream
        self._hosts = [EnvironmentHost(environment) for _ in range(rollout.envs_per_worker)]
        # Makes the names of a restarted worker's episodes different from those before; process ids repeat, above all in
        # containers.
        self._incarnation = secrets.token_hex(4)
        self._failed_slots: set[int] = set()
        self._restarts = 0
        self._failures: Counter[str] = Counter()
        self._failed_episodes = FailedEpisodes(environment.id, rollout.max_failed_episodes)
        self._evaluations: deque[tuple[EpisodeSpec, asyncio.Future[TrajectoryBatch | None]]] = deque()
        self._evaluation_requested = asyncio.Event()
        self._stream_calls: set[asyncio.Task[float]] = set()
        self._slot_tasks: list[asyncio.Task[None]] = []
        self._steps = 0  # of all episodes
        self._training_steps = 0  # of training episodes
        self._generate_seconds = 0.0
        self._environment_seconds = 0.0
        self._stream_wait_seconds = 0.0

    async def label_sizes(self) -> tuple[int, ...]:
        """Number of labels of each head of the environment's label space; starts an environment where none runs."""
        host = self._hosts[0]
        if host.pid is None:
            await host.start()
        return tuple(head.size for head in host.label_space.heads)

    async def action_parser(self) -> Parser | None:
        """The parser of the environment's utterances, or None; starts an environment where none runs."""
        host = self._hosts[0]
        if host.pid is None:
            await host.start()
        return await host.parser()

    # ---------------------------------------------------------------- lock-step (sync mode)

    async def collect(self, update: int, steps: int) -> TrajectoryBatch:
        """New whole episodes with at least `steps` steps together, in lock-step.

        The same update and weights give the same episodes, whatever happened before.
        """
        begun = 0
        finished_steps = 0

        def more(active_steps: int) -> EpisodeSpec | None:
            nonlocal begun
            # Running episodes count with the steps that they have so far. So enough episodes are started to reach
            # `steps`, and no more once the running ones reach it.
            if finished_steps + active_steps >= steps:
                return None
            begun += 1
            worker = self._launch.worker
            seed = training_seed(self._launch.run_seed, update, worker, begun)
            return EpisodeSpec(f"{update}-{worker}-{begun}", seed, self._rollout.temperature)

        batches = []
        async for recorder in self._lock_step(more):
            if len(recorder):
                finished_steps += len(recorder)
                batches.append((recorder.spec.name, recorder.batch()))
        batches.sort(key=lambda item: int(item[0].rsplit("-", 1)[1]))
        return TrajectoryBatch.concatenate(batch for _, batch in batches)

    async def evaluate_batch(self, seeds: Sequence[int], temperature: float) -> EvaluationResult:
        """One held-out episode per seed, in lock-step."""
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
        """Run episodes in rounds: one batch with the request of every active environment, then all steps at once.

        `next_spec(active_steps)` returns the next episode, or None to start none now. Yields each finished recorder.
        """
        active: dict[int, EpisodeRecorder] = {}
        while True:
            usable = [slot for slot, host in enumerate(self._hosts) if not host.quarantined]
            beginning: dict[int, EpisodeRecorder] = {}
            for slot in usable or range(len(self._hosts)):
                if slot in active:
                    continue
                running = [*active.values(), *beginning.values()]
                spec = next_spec(sum(len(recorder) + 1 for recorder in running))
                if spec is not None:
                    beginning[slot] = self._recorder(spec, slot)
            begun = await asyncio.gather(*(self._begin(recorder, slot) for slot, recorder in beginning.items()))
            for (slot, recorder), has_begun in zip(beginning.items(), begun, strict=True):
                if has_begun:
                    active[slot] = recorder
                else:
                    yield recorder
            if not beginning and not active:
                return
            slots = sorted(active)
            requests = [active[slot].request() for slot in slots]
            answers = await self._policy.generate_batch(self._launch.worker, requests)
            await asyncio.gather(
                *(self._step(active[slot], slot, answer) for slot, answer in zip(slots, answers, strict=True))
            )
            for slot in slots:
                if active[slot].over:
                    yield active.pop(slot)

    # ---------------------------------------------------------------- free-running (async mode)

    async def start(self, update: int) -> None:
        """Let every environment run training episodes, seeded by `update`, and stream them until `stop`."""
        if self._slot_tasks:
            return
        self._slot_tasks = [
            asyncio.create_task(self._run_slot(slot, self._training_specs(update, slot)))
            for slot in range(len(self._hosts))
        ]

    async def evaluate(self, seeds: Sequence[int], temperature: float) -> EvaluationResult:
        """One held-out episode per seed. Environments take them as they become free, before training episodes."""
        futures = []
        for seed in seeds:
            future: asyncio.Future[TrajectoryBatch | None] = asyncio.get_running_loop().create_future()
            self._evaluations.append((EpisodeSpec(f"evaluation-{seed}", seed, temperature), future))
            futures.append(future)
        self._evaluation_requested.set()
        everything = asyncio.gather(*futures)
        waiting: set[asyncio.Future[Any]] = {everything, *self._slot_tasks}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            everything.cancel()
            await self.status()  # raises the error that ended an environment's loop
        batches = await everything
        kept = [batch for batch in batches if batch is not None]
        return EvaluationResult(TrajectoryBatch.concatenate(kept), len(batches) - len(kept))

    def _training_specs(self, update: int, slot: int) -> Iterator[EpisodeSpec]:
        worker = self._launch.worker
        count = 0
        while True:
            seed = training_seed(self._launch.run_seed, update, worker, slot, count)
            name = f"{update}-{worker}-{slot}-{count}-{self._incarnation}"
            yield EpisodeSpec(name, seed, self._rollout.temperature)
            count += 1

    async def _run_slot(self, slot: int, training: Iterator[EpisodeSpec]) -> None:
        """Run episode after episode, each when the stream permits it. While it does not, the environment still runs
        evaluations: the learner waits for these, and the stream for the learner."""
        assert self._stream is not None
        environment = f"{self._launch.worker}-{slot}"
        permit = self._call_stream(self._stream.begin, environment)
        while True:
            if self._evaluations:
                await self._run_evaluation(slot)
            elif not permit.done():
                self._evaluation_requested.clear()
                request: asyncio.Future[Any] = asyncio.ensure_future(self._evaluation_requested.wait())
                waiting: set[asyncio.Future[Any]] = {permit, request}
                try:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    request.cancel()
            else:
                self._stream_wait_seconds += permit.result()
                recorder = await self._run_episode(next(training), slot)
                if len(recorder):
                    permit = self._call_stream(self._stream.put, environment, recorder.batch())
                else:
                    permit = self._call_stream(self._stream.begin, environment)

    def _call_stream(self, method: Any, *arguments: Any) -> asyncio.Task[float]:
        """Start a call of the stream. Its task ends when the next episode may begin; its result: the seconds waited."""

        async def call() -> float:
            return await method.remote(*arguments)

        task = asyncio.create_task(call())
        self._stream_calls.add(task)
        task.add_done_callback(self._stream_calls.discard)
        return task

    async def _run_evaluation(self, slot: int) -> None:
        """Run the next evaluation episode, again if its environment fails."""
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
                answer = await self._policy.generate(self._server(slot), recorder.request(seeded=False))
                await self._step(recorder, slot, answer)
        return recorder

    # ---------------------------------------------------------------- shared

    def _server(self, slot: int) -> int:
        """The server that a slot prefers: environments are spread evenly over the servers."""
        return self._launch.worker * len(self._hosts) + slot

    def _recorder(self, spec: EpisodeSpec, slot: int) -> EpisodeRecorder:
        return EpisodeRecorder(
            spec,
            run=self._launch.run,
            run_seed=self._launch.run_seed,
            environment=self._hosts[slot].settings.id,
            worker=self._launch.worker,
            slot=slot,
            max_new_tokens=self._rollout.max_new_tokens,
        )

    async def _begin(self, recorder: EpisodeRecorder, slot: int) -> bool:
        """Reset the slot's environment; start it first if it does not run. False when it failed."""
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

    async def _step(self, recorder: EpisodeRecorder, slot: int, answer: Generation | Refusal) -> None:
        if isinstance(answer, Refusal):
            self._refuse(recorder, slot, answer)
            return
        started = time.monotonic()
        try:
            outcome = await self._hosts[slot].step(answer.text)
        except EnvironmentFailure as failure:
            self._note_failure(recorder, slot, failure)
            return
        seconds = time.monotonic() - started
        self._steps += 1
        self._training_steps += recorder.spec.seed < EVALUATION_SEED_BASE
        self._environment_seconds += seconds
        self._generate_seconds += answer.seconds
        recorder.record(answer, outcome, seconds)
        # The learner takes the value of what a training episode was cut off at, so it must be able to.
        if recorder.cut_off and recorder.spec.seed < EVALUATION_SEED_BASE:
            refusal = await self._policy.refusal(self._server(slot), recorder.request())
            if refusal is not None:
                self._refuse(recorder, slot, refusal)
                return
        if recorder.over:
            self._failed_episodes.finished()

    def _refuse(self, recorder: EpisodeRecorder, slot: int, refusal: Refusal) -> None:
        recorder.refuse(refusal.reason)
        self._count_failure(recorder, slot, refusal.reason, refusal.detail)

    def _note_failure(self, recorder: EpisodeRecorder, slot: int, failure: EnvironmentFailure) -> None:
        self._failed_slots.add(slot)
        recorder.fail(f"environment_{failure.reason}")
        self._count_failure(recorder, slot, failure.reason, failure.detail)

    def _count_failure(self, recorder: EpisodeRecorder, slot: int, reason: str, detail: str) -> None:
        """Count an episode that failed. Raises `TooManyFailedEpisodes`."""
        logger.warning("slot %d: %s: %s", slot, reason, detail)
        self._failures[reason] += 1
        self._failed_episodes.failed(recorder.spec.name, reason, detail)

    async def status(self) -> dict[str, Any]:
        """Process id, whether environments run freely (async mode), counts since the start, memory in bytes.

        Raises the error that ended an environment's loop, so that the caller sees it and not only the log.
        """
        for task in self._slot_tasks:
            if task.done():
                task.result()
        return {
            "pid": os.getpid(),
            "running": bool(self._slot_tasks),
            "steps": self._steps,
            "training_steps": self._training_steps,
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
        """Stop the environments' loops and end their processes."""
        ending = [*self._slot_tasks, *self._stream_calls]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._slot_tasks = []
        while self._evaluations:
            self._evaluations.popleft()[1].cancel()
        await asyncio.gather(*(host.close() for host in self._hosts))


def make_rollout_worker(cpus: float, resources: dict[str, float], strategy: Any, *arguments: Any) -> Any:
    """Start a `RolloutWorker` as a Ray actor, which Ray restarts when it dies; `arguments` as for the class.

    resources: custom Ray resources that it takes, for instance {"emulator": 8.0}. strategy: Ray's scheduling strategy.
    """
    options = {
        "num_cpus": cpus,
        "resources": resources,
        "scheduling_strategy": strategy,
        "max_restarts": -1,
        "max_concurrency": 1000,
    }
    return ray.remote(RolloutWorker).options(**options).remote(*arguments)
