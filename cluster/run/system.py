"""All the actors of a run: started together, wired to each other, and ended by their handles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.chat import ChatProcessor, NotAVisionLanguageModel
from actors.generation import Refusal
from actors.model_folder import read_model
from actors.rollouts.policy_client import PolicyClient
from actors.rollouts.stream import TrajectoryStream
from actors.serving.weight_transfer import COLLECTIVE_TRANSPORTS, WeightRegistry, check_received
from actors.trajectory import TrajectoryBatch
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.adapters import served_adapters
from cluster.launch.learner import learner_setup, start_learner
from cluster.launch.placement import transport_of
from cluster.launch.reservation import reserve
from cluster.run.collection import Collector, StreamCollector, SynchronousCollector, worker_statuses
from cluster.run.rollout_actors import start_policy_servers, start_rollout_workers, wait_for_servers
from cluster.run.run_folder import Progress, RunFolder, may_be_on_hub
from cluster.run.scoring_stage import ScoringStage, load_scm, make_scoring_pool, pretrain_scm, save_scm
from cluster.run.supervision import Supervisor
from cluster.run.sync_check import SyncCheck
from cluster.run.waiting import answer, answer_of_restarted, answers
from envs.parsing import Parser
from learner.checkpoints.format import CheckpointMismatch
from learner.group import LearnerFailed, LearnerGroup
from learner.publish import connect_servers, remove_weight_files, sync_servers
from learner.setup import PublishTarget
from scoring.pool.scoring_pool import ScoringPool

#: How long an actor may take to end in good order before it is killed, seconds.
STOP_DEADLINE_S = 10.0
#: Calls that the stream holds at once: every environment may be waiting there, and the learner has to get through.
STREAM_CONCURRENCY = 1_000_000


def require_model(config: RunConfig, trained: bool = True) -> ChatProcessor:
    """The processor of `model.path`. trained: whether a learner trains it. Raises `CosoError` where there is no model
    that can be used."""
    path = config.model.path
    if not path or not (Path(path).exists() or may_be_on_hub(path)):
        raise CosoError(
            f"model.path {path!r} does not exist. `coso warmstart` with the same config makes the default model; or "
            "name a folder or hub name of a Hugging Face vision-language model."
        )
    lora = config.learner.served_adapters if trained else None
    try:
        return read_model(
            path, device=config.policy_server.device, trained=trained, adapters=lora.target if lora else None
        )
    except NotAVisionLanguageModel as error:
        raise CosoError(str(error)) from None


class System:
    """The actors of one run. `start` it, use its parts, `close` it."""

    def __init__(self, config: RunConfig, run: RunFolder, progress: Progress, temporary: Path) -> None:
        self.config = config
        self._chat = require_model(config)
        adapters = served_adapters(config, self._chat)
        self.places = reserve(config)
        self.transport = transport_of(config, self.places.plan)
        self._weights_name = run.weights_name
        self._fallback_folder = run.path
        self._sync_check = SyncCheck(config)
        self.supervisor = Supervisor(
            config.cluster.max_recoveries, config.cluster.recovery_window_s, progress.recoveries
        )
        beside_driver = {"num_cpus": 0, "scheduling_strategy": self.places.strategy("trajectory stream")}
        self.registry: Any = ray.remote(WeightRegistry).options(max_restarts=-1, **beside_driver).remote()
        self.servers = start_policy_servers(config, temporary, self.registry, self.places, adapters)
        self.stream = (
            ray.remote(TrajectoryStream)
            .options(max_concurrency=STREAM_CONCURRENCY, **beside_driver)
            .remote(config.rollout.stream_bytes, 0)  # training episodes begin with the first batch that is collected
        )
        self.workers = start_rollout_workers(config, list(self.servers.values()), self.stream, self.places)
        #: Held while the learner's weights are between two versions: from an update's beginning until it is published.
        self.between_versions = asyncio.Lock()
        self._published = 0  # version
        self._rollouts_from: int | None = None  # the update that seeds the rollouts; None before they start
        self._connected: list[tuple[int, int]] = []  # incarnations of the servers that the learner can broadcast to
        self._learner: LearnerGroup | None = None
        self.pool: ScoringPool | None = None
        self._scoring: ScoringStage | None = None
        self.collector: Collector = (
            SynchronousCollector(config, self.workers)
            if config.mode == "sync"
            else StreamCollector(config, self.workers, self.stream)
        )

    @classmethod
    async def start(
        cls, config: RunConfig, run: RunFolder, progress: Progress, temporary: Path, console: Any
    ) -> System:
        """Start everything at once and wait until all of it is up, at the checkpoint of `progress` (update 0: none)."""
        system = cls(config, run, progress, temporary)
        update = progress.update
        try:
            console.stage("starting policy servers, learner, scorers and environments")
            checkpoint = run.checkpoint_path(update)
            await asyncio.gather(
                system._start_servers_and_learner(checkpoint / "learner" if update else None, console.message),
                system._start_pool(checkpoint if update else None),
            )
            if system.broadcasts:
                await system._connect_servers()
            system._watch()
        except BaseException:
            await system.close()
            raise
        return system

    @property
    def broadcasts(self) -> bool:
        """Whether weights are broadcast, so that a restarted server can only be sent the learner's present ones."""
        return self.transport in COLLECTIVE_TRANSPORTS

    @property
    def learner(self) -> LearnerGroup:
        """The learner; there once `start` is through."""
        assert self._learner is not None
        return self._learner

    # ---------------------------------------------------------------- what the controller calls

    async def start_rollouts(self, update: int) -> None:
        """In async mode, let the workers run on their own from here on."""
        if self.config.mode == "async":
            deadline = self.config.environment.start_deadline_s
            await answers([w.start.remote(update) for w in self.workers], deadline, "starting the rollout workers")
            self._rollouts_from = update

    async def in_learners_turn(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, in a thread; where the policy servers give their GPUs' memory back for the learner
        (policy_server.sleep), they sleep meanwhile."""
        if not self.config.policy_server.sleep:
            return await asyncio.to_thread(call)
        await self._on_servers("sleep")
        try:
            return await asyncio.to_thread(call)
        finally:
            await self._on_servers("wake")

    def probe_with(self, batch: TrajectoryBatch) -> None:
        """Take the prompts of the next `check_sync` from this batch."""
        self._sync_check.choose(batch)

    @contextmanager
    def waiting_for_scores(self) -> Iterator[None]:
        """While the learner waits for a batch, scoring has the priority of other actors, and not only idle cores."""
        if self.pool is None:
            yield
            return
        self.pool.waited_for = True
        try:
            yield
        finally:
            self.pool.waited_for = False

    def score(self, batch: TrajectoryBatch, update: int, replayed: bool) -> tuple[TrajectoryBatch, dict[str, float]]:
        """`ScoringStage.score`."""
        assert self._scoring is not None
        return self._scoring.score(batch, update, replayed)

    async def publish(self, version: int) -> dict[str, float]:
        """The learner's weights, as `version`, into every live policy server. Nothing in flight is lost. To be called
        with `between_versions` held. Raises `WeightTransferError` if an engine was given other tensors."""
        deadline = self.config.weight_sync.deadline_s
        if self.broadcasts and await self._incarnations() != self._connected:
            await self._connect_servers()  # a group's members are processes, and one of them is new
        update = await asyncio.to_thread(self.learner.publish, version)
        update = await answer(self.registry.put.remote(update), deadline, "the weight registry")
        reports = await asyncio.to_thread(self._sync, update, deadline)
        for name, report in reports.items():
            check_received(update, report.checksums, name)
        self._published = version
        await self.collector.published(version)
        return {"time/swap": max(report.seconds for report in reports.values())}

    async def check_sync(self, version: int) -> dict[str, float]:
        """Compare the log-probabilities of one live engine, a different one each time, with the learner's.

        Catches whatever a load can leave stale: a tied head, a cache. Raises `CosoError`, see `SyncCheck.judge`.
        """
        if not (requests := self._sync_check.requests):
            return {}
        name, server = list(self.servers.items())[version % len(self.servers)]
        client = PolicyClient([server], self.config.policy_server.answer_deadline_s, f"the sync check of {name}")
        made: list[Any] = await client.generate_batch(0, requests)
        for refusal in (each for each in made if isinstance(each, Refusal)):
            # The prompts are those of a batch, so this server or another one has answered each of them before.
            raise CosoError(f"the sync check of {name}: a prompt of the batch is refused now ({refusal.detail})")
        logprobs = await asyncio.to_thread(self.learner.token_logprobs, self._sync_check.rows(made))
        return self._sync_check.judge(name, version, made, logprobs)

    async def server_statuses(self) -> list[dict[str, Any]]:
        """Of the policy servers, once they are up."""
        deadline = self.config.policy_server.start_deadline_s
        return [
            await answer_of_restarted(server.ready.remote, deadline, f"the start of {name}")
            for name, server in self.servers.items()
        ]

    async def steps_taken(self) -> int:
        """Steps that environments have made in training episodes since the start, whatever became of them. Of a worker
        that died, those up to its last status, which the supervisor asks for every second."""
        for index, status in enumerate(await worker_statuses(self.workers)):
            if status is not None:
                self.supervisor.note(f"rollout worker {index}", status)
        return self.supervisor.training_steps

    def scoring_recoveries(self) -> dict[str, int]:
        """Scorers and SCM trainers that were replaced since the start, by kind."""
        return self.pool.recoveries if self.pool is not None else {}

    def save_scm(self, folder: Path) -> None:
        """Write the SCM trainer's state into a checkpoint's folder."""
        assert self.pool is not None
        save_scm(self.pool, folder)

    def restart_learner(self, checkpoint: Path | None) -> None:
        """End what is left of the ranks and start anew, from a checkpoint or from the model the run began with."""
        self.learner.restart(checkpoint)
        self._connected = []

    async def close(self) -> None:
        """End every actor; by force where it does not end in good order."""
        await self.supervisor.close()
        with suppress(Exception):
            await answers([worker.stop.remote() for worker in self.workers], STOP_DEADLINE_S, "ending the workers")
        if self._learner is not None:
            self._learner.close()
        if self.pool is not None:
            self.pool.close()
        for actor in [*self.workers, *self.servers.values(), self.stream, self.registry]:
            ray.kill(actor)
        remove_weight_files(self._weights_name, self._fallback_folder)

    # ---------------------------------------------------------------- parts

    async def _start_servers_and_learner(self, checkpoint: Path | None, report: Callable[[str], None]) -> None:
        servers = wait_for_servers(self.config, list(self.servers.values()), report)
        if self.config.shares_gpus:
            # An engine measures what is free of its GPU as it starts, and gives up if that changes meanwhile.
            await servers
            await self.in_learners_turn(lambda: self._start_learner(checkpoint))
        else:
            await asyncio.gather(servers, asyncio.to_thread(self._start_learner, checkpoint))

    async def _on_servers(self, method: str) -> None:
        deadline = self.config.policy_server.start_deadline_s
        await asyncio.gather(
            *(
                answer_of_restarted(getattr(server, method).remote, deadline, f"{method} of {name}")
                for name, server in self.servers.items()
            )
        )

    def _start_learner(self, checkpoint: Path | None) -> None:
        publishing = PublishTarget(
            transport=self.transport, run=self._weights_name, fallback_folder=self._fallback_folder
        )
        try:
            setup = learner_setup(self.config, publishing)
            self._learner = start_learner(self.config, setup, self.places.ranks_group)
            if checkpoint is not None:
                self._learner.load_checkpoint(checkpoint)
        except (LearnerFailed, ValueError, CheckpointMismatch) as error:
            raise CosoError(f"the learner could not start: {error}") from error

    async def _start_pool(self, checkpoint: Path | None) -> None:
        """The scoring pool, with an SCM from the checkpoint or pre-trained on the model's demonstrations."""
        if not self.config.entropy.needs_influence:
            return
        deadline = self.config.environment.start_deadline_s
        sizes = await answer(self.workers[0].label_sizes.remote(), deadline, "an environment's label space")
        parser = await answer(self.workers[0].action_parser.remote(), deadline, "an environment's parser")
        if parser is None and "parser" in self.config.scoring.estimator:
            raise CosoError(
                f"{self.config.environment.id} has no parser, which scoring.estimator {self.config.scoring.estimator} "
                "needs: give it one (see envs.base.TextActionEnv), or choose scm"
            )
        await asyncio.to_thread(self._make_pool, sizes, parser, checkpoint)

    def _make_pool(self, head_sizes: tuple[int, ...], parser: Parser | None, checkpoint: Path | None) -> None:
        pool = make_scoring_pool(self.config, self._chat, head_sizes, parser, self.places)
        pool.start()
        self.pool = pool
        self._scoring = ScoringStage(self.config, pool, self._chat)
        if checkpoint is None:
            pretrain_scm(self.config, pool)
        else:
            load_scm(pool, checkpoint)

    async def _incarnations(self) -> list[tuple[int, int]]:
        return [_incarnation(status) for status in await self.server_statuses()]

    async def _connect_servers(self) -> None:
        """Connect learner and policy servers for broadcasts."""
        sync = self.config.weight_sync
        statuses = await self.server_statuses()
        addresses = [status["address"] for status in statuses]
        group, connecting = await asyncio.to_thread(
            self.learner.open_sync, addresses, self.config.policy_server.tensor_parallel, sync.deadline_s
        )
        await asyncio.to_thread(connect_servers, list(self.servers.items()), group, connecting)
        self._connected = [_incarnation(status) for status in statuses]

    async def _restart_server(self) -> None:
        """A restarted server has missed the last broadcast: connect it and publish the current weights again."""
        if not self.broadcasts:
            return  # it took them from the registry
        async with self.between_versions:
            if self._published > 0 and await self._incarnations() != self._connected:
                await self.publish(self._published)

    def _sync(self, update: Any, deadline: float) -> dict[str, Any]:
        sending = self.learner.send() if self.broadcasts else ()
        return sync_servers(self.servers, update, deadline, sending)

    def _watch(self) -> None:
        for index, server in enumerate(self.servers.values()):
            self.supervisor.watch(
                "policy server",
                index,
                server,
                self.config.policy_server.start_deadline_s,
                on_restart=self._restart_server,
            )
        for index, worker in enumerate(self.workers):
            self.supervisor.watch(
                "rollout worker",
                index,
                worker,
                self.config.environment.start_deadline_s,
                on_restart=partial(self._restart_worker, worker),
            )

    async def _restart_worker(self, worker: Any) -> None:
        if self._rollouts_from is not None:
            await answer(worker.start.remote(self._rollouts_from), 60.0, "starting a rollout worker again")


def _incarnation(status: dict[str, Any]) -> tuple[int, int]:
    """Of a policy server's process: how often the server was started before, and the process id. An id alone may be
    that of a process before, above all in containers."""
    return status["incarnation"], status["pid"]
