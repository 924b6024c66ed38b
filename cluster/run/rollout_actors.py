"""Starting the actors that make episodes: policy servers and rollout workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.rollouts.worker import RolloutLaunch, make_rollout_worker
from actors.serving.adapters import ServedAdapters
from actors.serving.policy_engine import PolicyServerLaunch, policy_server_environment
from actors.serving.policy_server import PolicyServer
from actors.settings import Transport
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.ray_runtime import ACTOR_ENVIRONMENT, emulators_per_worker
from cluster.run.supervision import Supervisor
from cluster.run.waiting import answers


async def evaluation_actors(config: RunConfig, temporary: Path, supervisor: Supervisor) -> list[Any]:
    """Policy servers and rollout workers only, ready for lock-step evaluation and watched; returns the workers."""
    servers = list(start_policy_servers(config, temporary, "shared_memory", None).values())
    await wait_for_servers(config, servers)
    workers = start_rollout_workers(config, servers, None)
    for index, server in enumerate(servers):
        supervisor.watch("policy server", index, server, config.policy_server.start_deadline_s)
    for index, worker in enumerate(workers):
        supervisor.watch("rollout worker", index, worker, config.environment.start_deadline_s)
    return workers


def start_policy_servers(
    config: RunConfig, temporary: Path, transport: Transport, registry: Any, adapters: ServedAdapters | None = None
) -> dict[str, Any]:
    """One actor per replica, by name; Ray restarts one that dies. adapters: that they are to apply."""
    servers = {}
    settings = config.policy_server
    gpus = settings.tensor_parallel if settings.device == "cuda" else 0
    for index in range(settings.replicas):
        launch = PolicyServerLaunch(
            index=index,
            run_seed=config.seed,
            temp_folder=str(temporary / f"v{index}"),
            transport=transport,
            adapters=adapters,
        )
        environment = ACTOR_ENVIRONMENT | policy_server_environment(config.model, settings, launch)
        servers[launch.name] = (
            ray.remote(PolicyServer)
            .options(
                num_cpus=config.cluster.policy_server_cpus,
                num_gpus=gpus,
                max_restarts=-1,
                max_concurrency=10_000,
                runtime_env={"env_vars": environment},
            )
            .remote(config.model, settings, launch, registry)
        )
    return servers


def start_rollout_workers(config: RunConfig, servers: Sequence[Any], stream: Any | None) -> list[Any]:
    """The configured rollout workers, spread over the nodes."""
    cpus, emulators = config.cluster.rollout_worker_cpus, emulators_per_worker(config)
    workers = []
    for index in range(config.rollout.workers):
        launch = RolloutLaunch(
            run=config.name,
            run_seed=config.seed,
            worker=index,
            answer_deadline_s=config.policy_server.answer_deadline_s,
        )
        workers.append(
            make_rollout_worker(cpus, emulators, config.environment, config.rollout, launch, servers, stream)
        )
    return workers


async def wait_for_servers(config: RunConfig, servers: Sequence[Any]) -> None:
    """Wait until every engine serves. Raises `CosoError` naming the server and vLLM's reason."""
    deadline = config.policy_server.start_deadline_s + 60.0
    try:
        await answers([server.ready.remote() for server in servers], deadline, "starting the policy servers")
    except ray.exceptions.RayTaskError as error:
        raise CosoError(f"a policy server could not start: {error.cause}") from None
    except ray.exceptions.RayActorError as error:
        raise CosoError(f"a policy server died as it started: {error}") from None
