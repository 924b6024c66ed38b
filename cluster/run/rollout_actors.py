"""Starting the actors that make episodes: policy servers and rollout workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from actors.rollouts.worker import RolloutLaunch, make_rollout_worker
from actors.serving.adapters.served import ServedAdapters
from actors.serving.policy_engine import PolicyServerLaunch, policy_server_environment
from actors.serving.policy_server import PolicyServer
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.ray_runtime import ACTOR_ENVIRONMENT, emulators_per_worker
from cluster.launch.reservation import Reservation, reserve
from cluster.run.supervision import Supervisor
from cluster.run.waiting import answers

#: While policy servers start: time between two reports, and how long to wait for what one is doing, seconds.
START_REPORT_S = 30.0
STATUS_DEADLINE_S = 5.0


async def evaluation_actors(config: RunConfig, temporary: Path, supervisor: Supervisor) -> list[Any]:
    """Policy servers and rollout workers only, ready for lock-step evaluation and watched; returns the workers."""
    places = reserve(config, "policy server", "rollout worker")
    servers = list(start_policy_servers(config, temporary, None, places).values())
    await wait_for_servers(config, servers)
    workers = start_rollout_workers(config, servers, None, places)
    for index, server in enumerate(servers):
        supervisor.watch("policy server", index, server, config.policy_server.start_deadline_s)
    for index, worker in enumerate(workers):
        supervisor.watch("rollout worker", index, worker, config.environment.start_deadline_s)
    return workers


def start_policy_servers(
    config: RunConfig, temporary: Path, registry: Any, places: Reservation, adapters: ServedAdapters | None = None
) -> dict[str, Any]:
    """One actor per replica, by name; Ray restarts one that dies. adapters: that they are to apply."""
    servers = {}
    settings = config.policy_server
    for index in range(settings.replicas):
        launch = PolicyServerLaunch(
            index=index,
            run_seed=config.seed,
            temp_folder=str(temporary / f"v{index}"),
            adapters=adapters,
        )
        environment = ACTOR_ENVIRONMENT | policy_server_environment(config.model, settings, launch)
        servers[launch.name] = (
            ray.remote(PolicyServer)
            .options(
                num_cpus=config.cluster.policy_server_cpus,
                num_gpus=settings.gpus,
                scheduling_strategy=places.strategy("policy server", index),
                max_restarts=-1,
                max_concurrency=10_000,
                runtime_env={"env_vars": environment},
            )
            .remote(config.model, settings, launch, registry)
        )
    return servers


def start_rollout_workers(
    config: RunConfig, servers: Sequence[Any], stream: Any | None, places: Reservation
) -> list[Any]:
    """The configured rollout workers."""
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
            make_rollout_worker(
                cpus,
                emulators,
                places.strategy("rollout worker", index),
                config.environment,
                config.rollout,
                launch,
                servers,
                stream,
            )
        )
    return workers


async def wait_for_servers(
    config: RunConfig, servers: Sequence[Any], report: Callable[[str], None] | None = None
) -> None:
    """Wait until every engine serves. report: called every half minute with what those that do not yet are doing.
    Raises `CosoError` naming the server and vLLM's reason."""
    deadline = config.policy_server.start_deadline_s + 60.0
    started = time.monotonic()
    waiting = asyncio.ensure_future(
        answers([server.ready.remote() for server in servers], deadline, "starting the policy servers")
    )
    try:
        while not (await asyncio.wait({waiting}, timeout=START_REPORT_S))[0]:
            if report is not None:
                await _report_starts(servers, time.monotonic() - started, report)
        await waiting
    except ray.exceptions.RayTaskError as error:
        raise CosoError(f"a policy server could not start: {error.cause}") from None
    except ray.exceptions.RayActorError as error:
        raise CosoError(f"a policy server died as it started: {error}") from None
    finally:
        waiting.cancel()


async def _report_starts(servers: Sequence[Any], seconds: float, report: Callable[[str], None]) -> None:
    statuses = await asyncio.gather(*(_status(server) for server in servers))
    silent = sum(status is None for status in statuses)
    if silent:
        report(f"{silent} of {len(servers)} policy servers have no process yet after {seconds:.0f} s")
    for status in statuses:
        if status is not None and status["starting"] is not None:
            doing = status["starting"] or "its log is empty"
            report(f"{status['name']} has been starting for {seconds:.0f} s: {doing}")


async def _status(server: Any) -> dict[str, Any] | None:
    """None where there is no answer within a few seconds, as of an actor that Ray has not placed."""
    with suppress(TimeoutError, ray.exceptions.RayError):
        async with asyncio.timeout(STATUS_DEADLINE_S):
            status: dict[str, Any] = await server.status.remote()
            return status
    return None
