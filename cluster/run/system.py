"""All the actors of a run: started together, wired to each other, and ended by their handles."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.chat import ChatProcessor, NotAVisionLanguageModel
from actors.generation import GenerationRequest
from actors.rollouts.stream import TrajectoryStream
from actors.rollouts.worker import make_rollout_worker
from actors.serving.policy_engine import policy_server_environment
from actors.serving.policy_server import PolicyServer
from actors.serving.weight_transfer import COLLECTIVE_TRANSPORTS, Transport, WeightRegistry
from actors.trajectory import TrajectoryBatch
from cluster.config import mapping
from cluster.config.run_config import RunConfig
from cluster.demonstrations.warm_start import read_demonstrations
from cluster.errors import CosoError
from cluster.launch.learner import learner_setup, start_learner
from cluster.launch.ray_runtime import ACTOR_ENVIRONMENT, emulators_per_worker
from cluster.run.collection import Collector, StreamCollector, SynchronousCollector
from cluster.run.run_folder import RunFolder
from cluster.run.scoring_stage import ScoringStage
from cluster.run.supervision import Supervisor
from cluster.run.waiting import answer, answer_of_restarted, answers
from envs.parsing import Parser
from learner.checkpoint import CheckpointMismatch
from learner.group import LearnerFailed, LearnerGroup
from learner.publish import connect_servers, remove_weight_files, sync_servers
from learner.setup import PublishTarget
from scoring.effects.parser_effects import ParserSource
from scoring.effects.tokens import token_facts
from scoring.pool.scoring_pool import ScoringPool

#: Tokens of the answer by which a live engine is compared with the learner after a swap.
SYNC_CHECK_TOKENS = 16
#: How long an actor may take to end in good order before it is killed, seconds.
STOP_DEADLINE_S = 10.0
#: Calls that the stream holds at once: every environment may be waiting there, and the learner has to get through.
STREAM_CONCURRENCY = 1_000_000


def require_model(config: RunConfig) -> ChatProcessor:
    """The processor of `model.path`. Raises `CosoError` where there is no model that can be used."""
    path = config.model.path
    if not path or not Path(path).exists() and (path.startswith((".", "/", "models/")) or path.count("/") != 1):
        raise CosoError(
            f"model.path {path!r} does not exist. `coso warmstart` with the same config makes the default model; or "
            "name a folder or hub name of a Hugging Face vision-language model."
        )
    try:
        return ChatProcessor(path)
    except NotAVisionLanguageModel as error:
        raise CosoError(str(error)) from None


class System:
    """The actors of one run. `start` it, use its parts, `close` it."""

    def __init__(self, config: RunConfig, run: RunFolder, temporary: Path) -> None:
        self.config = config
        self.transport: Transport = mapping.transport(config, sum(node["Alive"] for node in ray.nodes()))
        self._chat = require_model(config)
        self._weights_name = run.weights_name(os.getpid())
        self._fallback_folder = run.path
        self._probe: tuple[str, str, bytes] | None = None
        self.supervisor = Supervisor(config.cluster.max_recoveries)
        self.registry: Any = ray.remote(WeightRegistry).options(num_cpus=0, max_restarts=-1).remote()
        self.servers = start_policy_servers(config, temporary, self.transport, self.registry)
        self.stream = (
            ray.remote(TrajectoryStream)
            .options(num_cpus=0, max_concurrency=STREAM_CONCURRENCY)
            .remote(config.rollout.stream_bytes, (1 + config.max_policy_lag) * config.training.steps_per_update)
        )
        self.workers = start_rollout_workers(config, list(self.servers.values()), self.stream)
        #: Held while the learner's weights are between two versions: from an update's beginning until it is published.
        self.between_versions = asyncio.Lock()
        self._published = 0  # version
        self._met: list[int] = []  # process ids of the servers that the learner can broadcast to
        self._learner: LearnerGroup | None = None
        self.pool: ScoringPool | None = None
        self._scoring: ScoringStage | None = None
        self.collector: Collector = (
            SynchronousCollector(config, self.workers)
            if config.mode == "sync"
            else StreamCollector(config, self.workers, self.stream)
        )

    @classmethod
    async def start(cls, config: RunConfig, run: RunFolder, update: int, temporary: Path, console: Any) -> System:
        """Start everything at once and wait until all of it is up, at the checkpoint of `update` (0: none)."""
        system = cls(config, run, temporary)
        try:
            console.stage("starting policy servers, learner, scorers and environments")
            checkpoint = run.checkpoint_path(update)
            await asyncio.gather(
                system._wait_for_servers(),
                asyncio.to_thread(system._start_learner, checkpoint / "learner" if update else None),
                system._start_pool(checkpoint if update else None),
            )
            if system.transport in COLLECTIVE_TRANSPORTS:
                await system._meet()
            system._watch()
        except BaseException:
            await system.close()
            raise
        return system

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
            self._update = update

    def probe_with(self, batch: TrajectoryBatch) -> None:
        """Take the batch's first step as what the next `check_sync` asks."""
        first = batch.steps.slice(0, 1).to_pylist()[0]
        self._probe = (first["prompt"], first["image"], batch.images[first["image"]])

    def score(self, batch: TrajectoryBatch) -> tuple[TrajectoryBatch, dict[str, float]]:
        """Train the SCM on the batch and write every token's influence into it."""
        assert self._scoring is not None
        return self._scoring.score(batch)

    async def publish(self, version: int) -> dict[str, float]:
        """The learner's weights, as `version`, into every live policy server. Nothing in flight is lost. To be called
        with `between_versions` held."""
        deadline = self.config.weight_sync.deadline_s
        if self.transport in COLLECTIVE_TRANSPORTS and await self._server_pids() != self._met:
            await self._meet()  # a collective's members are processes, and one of them is new
        update = await asyncio.to_thread(self.learner.publish, version)
        update = await answer(self.registry.put.remote(update), deadline, "the weight registry")
        reports = await asyncio.to_thread(self._sync, update, deadline)
        self._published = version
        await self.collector.published(version)
        return {"time/swap": max(report.seconds for report in reports.values())}

    async def check_sync(self, version: int) -> dict[str, float]:
        """Compare a live engine's log-probabilities with the learner's on one prompt, the first of the last batch.

        Catches whatever a swap can leave stale: a tied head, a cache. Raises `CosoError` beyond the tolerance.
        """
        if self._probe is None:
            return {}
        prompt, image, png = self._probe
        request = GenerationRequest(prompt, image, png, self.config.rollout.temperature, SYNC_CHECK_TOKENS, seed=1)
        name, server = list(self.servers.items())[version % len(self.servers)]
        serving = self.config.policy_server
        (made,) = await answer_of_restarted(
            lambda: server.generate_batch.remote([request]),
            serving.start_deadline_s + serving.generate_deadline_s,
            f"the sync check of {name}",
        )
        probe = TrajectoryBatch.from_rows(
            [
                {
                    "prompt": prompt,
                    "image": image,
                    "prompt_ids": made.prompt_ids,
                    "response_ids": made.response_ids,
                    "behaviour_logprobs": made.logprobs,
                }
            ],
            {image: png},
        )
        (logprobs,) = await asyncio.to_thread(self.learner.token_logprobs, probe)
        differences = np.abs(logprobs - made.logprobs)
        largest = float(differences.max())
        if largest > self.config.weight_sync.check_tolerance:
            raise CosoError(
                f"{name} answers with log-probabilities up to {largest:.3f} away from the learner's under the same "
                f"weights (version {version}): its weights or caches are stale. weight_sync.check_tolerance is "
                f"{self.config.weight_sync.check_tolerance}."
            )
        # Schulman's k3 estimator of KL(engine || learner), never below 0.
        log_ratio = (logprobs - made.logprobs).astype(np.float64)
        return {
            "sync_check/max_difference": largest,
            "sync_check/mean_difference": float(differences.mean()),
            "sync_check/kl": float(np.mean(np.expm1(log_ratio) - log_ratio)),
        }

    def scoring_recoveries(self) -> dict[str, int]:
        """Scorers and SCM trainers that were replaced since the start, by kind."""
        return self.pool.recoveries if self.pool is not None else {}

    def save_scm(self, folder: Path) -> None:
        """The SCM trainer's whole state: tensors as safetensors, facts as JSON."""
        from safetensors.torch import save_file

        assert self.pool is not None
        tensors, facts = self.pool.state()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "scm.safetensors")
        (folder / "scm.json").write_text(json.dumps(facts), encoding="utf-8")

    def restart_learner(self, checkpoint: Path | None) -> None:
        """End what is left of the ranks and start anew, from a checkpoint or from the model the run began with."""
        self.learner.restart(checkpoint)
        self._met = []

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

    async def _wait_for_servers(self) -> None:
        await wait_for_servers(self.config, self.servers)

    def _start_learner(self, checkpoint: Path | None) -> None:
        publishing = PublishTarget(
            transport=self.transport, run=self._weights_name, fallback_folder=self._fallback_folder.absolute()
        )
        try:
            self._learner = start_learner(self.config, learner_setup(self.config, publishing))
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
        from safetensors.torch import load_file

        try:
            tokens = token_facts(self._chat.tokenizer, _vocabulary_size(self._chat), self.config.scoring.null_token)
        except ValueError as error:
            raise CosoError(str(error)) from None
        pool = ScoringPool(
            mapping.scm_settings(self.config, tokens.vocab_size, head_sizes),
            mapping.scm_training_settings(self.config),
            mapping.pool_settings(self.config),
            tokens,
            None if parser is None else ParserSource(tokenizer=self._chat.tokenizer, parser=parser),
        )
        pool.start()
        self.pool = pool
        self._scoring = ScoringStage(self.config, pool, self._chat)
        if checkpoint is not None:
            facts = json.loads((checkpoint / "scm.json").read_text(encoding="utf-8"))
            pool.load(load_file(checkpoint / "scm.safetensors"), facts)
        elif shown := read_demonstrations(self.config.model.path):
            utterances = shown.ragged("response_ids", np.int32)
            labels = np.stack(shown.ragged("action_labels", np.int32))
            pool.train(utterances, labels, rounds=self.config.scoring.scm.pretrain_rounds)

    async def _server_pids(self) -> list[int]:
        """Of the policy servers, once they are up."""
        deadline = self.config.policy_server.start_deadline_s
        statuses = [
            await answer_of_restarted(server.ready.remote, deadline, f"the start of {name}")
            for name, server in self.servers.items()
        ]
        return [status["pid"] for status in statuses]

    async def _meet(self) -> None:
        """Let learner and policy servers meet for broadcasts."""
        sync = self.config.weight_sync
        pids = await self._server_pids()
        group, connecting = await asyncio.to_thread(
            self.learner.open_sync, len(self.servers), self.config.policy_server.tensor_parallel, sync.deadline_s
        )
        await asyncio.to_thread(connect_servers, list(self.servers.items()), group, connecting)
        self._met = pids

    async def _restart_server(self) -> None:
        """A broadcast is not for those who come later: a server that restarted is met and sent the weights again."""
        if self.transport not in COLLECTIVE_TRANSPORTS:
            return  # it took them from the registry
        async with self.between_versions:
            if self._published > 0 and await self._server_pids() != self._met:
                await self.publish(self._published)

    def _sync(self, update: Any, deadline: float) -> dict[str, Any]:
        sending = self.learner.send() if self.transport in COLLECTIVE_TRANSPORTS else None
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
        if self.config.mode == "async":
            await answer(worker.start.remote(self._update), 60.0, "starting a rollout worker again")


async def evaluation_actors(config: RunConfig, temporary: Path) -> list[Any]:
    """Policy servers and rollout workers only, ready for lock-step evaluation; returns the workers."""
    servers = start_policy_servers(config, temporary, "shared_memory", None)
    await wait_for_servers(config, servers)
    return start_rollout_workers(config, list(servers.values()), None)


def start_policy_servers(config: RunConfig, temporary: Path, transport: Transport, registry: Any) -> dict[str, Any]:
    """One actor per replica, by name; Ray restarts one that dies."""
    servers = {}
    gpus = config.policy_server.tensor_parallel if config.policy_server.device == "cuda" else 0
    for index in range(config.policy_server.replicas):
        options = mapping.policy_server_options(config, temporary, index, transport)
        name = f"policy server {index}"
        environment = ACTOR_ENVIRONMENT | policy_server_environment(options)
        servers[name] = (
            ray.remote(PolicyServer)
            .options(
                num_cpus=config.cluster.policy_server_cpus,
                num_gpus=gpus,
                max_restarts=-1,
                max_concurrency=10_000,
                runtime_env={"env_vars": environment},
            )
            .remote(options, name, registry)
        )
    return servers


def start_rollout_workers(config: RunConfig, servers: Sequence[Any], stream: Any | None) -> list[Any]:
    """The configured rollout workers, spread over the nodes."""
    options = mapping.rollout_options(config)
    cpus, emulators = config.cluster.rollout_worker_cpus, emulators_per_worker(config)
    return [
        make_rollout_worker(cpus, emulators, options, index, servers, stream) for index in range(config.rollout.workers)
    ]


async def wait_for_servers(config: RunConfig, servers: dict[str, Any]) -> None:
    """Wait until every engine serves. Raises `CosoError` naming the server and vLLM's reason."""
    deadline = config.policy_server.start_deadline_s + 60.0
    try:
        await answers([server.ready.remote() for server in servers.values()], deadline, "starting the policy servers")
    except ray.exceptions.RayTaskError as error:
        raise CosoError(f"a policy server could not start: {error.cause}") from None


def _vocabulary_size(chat: ChatProcessor) -> int:
    """Ids the model has logits for, which may be more than the tokenizer has tokens."""
    text = chat.config.get_text_config()
    return max(int(text.vocab_size), len(chat.tokenizer))
