"""Start Ray on this machine or join a cluster, and check that its resources suffice before anything else starts."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.config.run_config import RunConfig
from cluster.errors import CosoError

#: Name of the driver that borrows emulators, and of the Ray resource that nodes with a fleet offer.
EMULATOR = "emulator"

#: Environment of every actor. One thread per process, since each stage has its own processes; no usage reports.
ACTOR_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

#: Environment of the process that starts Ray and of Ray's own processes; it silences Ray's C++ log.
DRIVER_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # No record of every call at the head node, which nobody reads: it takes a fifth of what a call costs.
    "RAY_task_events_report_interval_ms": "0",
    "TRANSFORMERS_VERBOSITY": "error",
}


def temporary_prefix(pid: int) -> str:
    """The prefix of the temporary folder of the run in process `pid`."""
    return f"coso-{pid}-"


def required_resources(config: RunConfig) -> dict[str, dict[str, float]]:
    """Total resources of each kind of actor: {"learner ranks": {"CPU": 2.0, "GPU": 0.0}, ...}.

    If environments borrow emulators of a node's fleet, rollout workers also take the resource `emulator`, so that Ray
    places them on nodes with a fleet.
    """
    cluster = config.cluster
    servers = config.policy_server.replicas
    ranks = config.learner.ranks
    return {
        "policy servers": {
            "CPU": servers * cluster.policy_server_cpus,
            "GPU": servers * config.policy_server.gpus,
        },
        "rollout workers": {
            "CPU": config.rollout.workers * cluster.rollout_worker_cpus,
            "GPU": 0.0,
            **{kind: config.rollout.workers * count for kind, count in emulators_per_worker(config).items()},
        },
        "scoring workers": {
            "CPU": (config.scoring.workers + 1) * cluster.scorer_cpus,
            "GPU": (config.scoring.workers + 1) * scoring_gpus(config),
        },
        "learner ranks": {"CPU": ranks * cluster.learner_cpus, "GPU": ranks * config.learner.gpus},
    }


def total_resources(config: RunConfig) -> dict[str, float]:
    """The sum of `required_resources`."""
    rows = required_resources(config).values()
    kinds = dict.fromkeys(kind for row in rows for kind in row)
    return {kind: sum(row.get(kind, 0.0) for row in rows) for kind in kinds}


def scoring_gpus(config: RunConfig) -> float:
    """The share of a GPU that each scorer and the SCM's trainer take: four of them fit on one."""
    return 0.25 if config.scoring.device == "cuda" else 0.0


def emulators_per_worker(config: RunConfig) -> dict[str, float]:
    """The custom resources of one rollout worker: `{"emulator": n}`, or {} if its environments borrow none."""
    if config.environment.kwargs.get("driver") != EMULATOR:
        return {}
    return {EMULATOR: float(config.rollout.envs_per_worker)}


def local_emulators(config: RunConfig) -> dict[str, float]:
    """The emulators that a Ray on this machine offers: as many as this node's fleet has; {} if none are needed."""
    if not emulators_per_worker(config):
        return {}
    from cluster.fleet.node import running_emulators

    device = config.environment.kwargs.get("device") or {}
    return {EMULATOR: float(running_emulators(device.get("fleet", "default")) or 0)}


def local_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def local_cpus(config: RunConfig) -> int:
    """Logical CPUs that a Ray on this machine offers, at least 1."""
    return max(1, int(local_cores() * config.cluster.oversubscribe))


def local_resources(config: RunConfig) -> dict[str, float]:
    """What a Ray on this machine offers."""
    return {"CPU": float(local_cpus(config)), "GPU": float(_local_gpus()), **local_emulators(config)}


def require_resources(config: RunConfig, available: dict[str, float], where: str) -> None:
    """Raise `CosoError` that names what is missing if `available` does not cover what the config needs."""
    short = []
    for kind, needed in total_resources(config).items():
        have = available.get(kind, 0.0)
        if needed > have + 1e-6:
            rows = required_resources(config).items()
            parts = ", ".join(f"{name} {row[kind]:g}" for name, row in rows if row.get(kind))
            hint = " (offered by nodes where `coso fleet start` was run)" if kind == EMULATOR else ""
            short.append(f"{needed:g} {kind}s are needed ({parts}) but {where} has {have:g}{hint}")
    if short:
        raise CosoError(
            "; ".join(short) + ". Ask for fewer (learner.ranks, policy_server.replicas, scoring.workers, "
            "rollout.workers), give each less (cluster.*_cpus), or, on one machine, raise cluster.oversubscribe."
        )


def require_local_resources(config: RunConfig) -> None:
    """`require_resources` for this machine, if the run starts its own Ray."""
    if config.cluster.address is None:
        require_resources(config, local_resources(config), "this machine")


@contextmanager
def ray_session(config: RunConfig, logs: Path | None = None) -> Iterator[Path]:
    """Run the block with Ray; yields a temporary folder with a short path, which is removed at the end.

    A Ray started here listens on loopback only and always ends with the block. If the block raises, the actors'
    output is first saved to `logs`. Raises `CosoError` if this machine's resources do not suffice, or no cluster
    answers. Whether those of a cluster suffice is seen where actors are placed (`cluster.launch.reservation`).
    """
    require_local_resources(config)
    import ray

    # Ray's Unix sockets are below this folder, and a socket path has at most 107 characters.
    temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(os.getpid()), dir=short_temporary_folder()))
    os.environ.update(DRIVER_ENVIRONMENT)
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        common: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "runtime_env": {"env_vars": ACTOR_ENVIRONMENT},
        }
        if config.cluster.address is None:
            _listen_on_loopback()
            with _standard_error_to(temporary / "ray-start.log"):
                ray.init(
                    address="local",
                    num_cpus=local_cpus(config),
                    resources=local_emulators(config),
                    include_dashboard=False,
                    object_store_memory=config.cluster.object_store_bytes,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(temporary / "ray"),
                    **common,
                )
        else:
            _join(config, common)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler prints a C++ stack trace
        yield temporary
    except Exception:
        if logs is not None:
            _save_actor_logs(temporary / "ray", logs)
        raise
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _standard_error_to(path: Path) -> Iterator[None]:
    """Redirect standard error, also of C++ code, to a file: Ray prints its log level there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _listen_on_loopback() -> None:
    """Make the next Ray on this machine listen on loopback only.

    Ray replaces a loopback address by the machine's own address and listens on every interface, unless its support
    for clusters is switched off. So this switches it off.
    """
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this process, which may already have imported Ray


def _save_actor_logs(ray_folder: Path, logs: Path) -> None:
    """Copy the non-empty output files of the actors to `logs`."""
    for pattern in ("worker-*.err", "worker-*.out"):
        for path in ray_folder.glob(f"session_2*/logs/{pattern}"):
            if path.stat().st_size:
                logs.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, logs)


def _join(config: RunConfig, common: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(address=config.cluster.address, **common)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        raise CosoError(
            f"no Ray cluster answered at {config.cluster.address!r}: {error}. Start one with `ray start --head`, or "
            "leave cluster.address null to run on this machine."
        ) from None


def _local_gpus() -> int:
    """Number of GPUs that Ray finds here, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def short_temporary_folder() -> str:
    """The parent folder for temporary folders of runs; its path is short."""
    folder = tempfile.gettempdir()
    # Ray adds about 60 characters.
    return folder if len(folder) <= 30 else "/tmp"
