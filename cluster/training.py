"""Whole runs: train, resume, evaluate. The CLI calls these; so can a Jupyter notebook or a test."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.config.files import validate
from cluster.config.paths import absolute_paths
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.preflight import preflight
from cluster.replacing import replace_text
from cluster.run.run_folder import Progress, RunFolder
from cluster.telemetry.wandb_run import require_wandb

Summary = dict[str, Any]


def train(config: RunConfig, overwrite: bool = False) -> Summary:
    """Train from `model.path` and return the content of `summary.json`. Raises `CosoError`."""
    from cluster.launch.ray_runtime import require_local_resources
    from cluster.run.system import require_model

    config = absolute_paths(config)
    preflight(config)
    require_wandb(config)
    require_model(config)
    require_local_resources(config)
    run = RunFolder.create(config, overwrite)
    try:
        return _run(config, run, None)
    finally:
        run.unlock()


def resume(path: Path, updates: int | None = None, trusted: Sequence[str] = ()) -> Summary:
    """Continue the run in `path` from its last checkpoint, or from the beginning if it has none.

    updates: extend the run to so many; the run folder's config keeps it for every later resume. trusted: code that its
    config may name, if another user made it (`cluster.config.trust`). Raises `CosoError`.
    """
    run = RunFolder.open_existing(path)
    config = run.config(trusted)
    preflight(config)
    require_wandb(config)
    run.lock()
    try:
        if updates is not None and updates > config.training.updates:
            config = extended(config, updates)
            run.write_config(config)
        checkpoints = run.checkpoint_updates()
        progress = run.read_progress(checkpoints[-1]) if checkpoints else Progress()
        if progress.update >= config.training.updates and run.summary.exists():
            raise CosoError(f"{path} is complete ({progress.update} updates); train further with --updates N")
        config = run.with_model(config, progress.update)
        return _run(config, run, progress)
    finally:
        run.unlock()


def extended(config: RunConfig, updates: int) -> RunConfig:
    """The config with `updates` updates. The schedules keep their horizon, so no update's learning rate changes."""
    values = config.model_dump()
    values["learner"]["schedule_updates"] = config.learner.schedule_updates or config.training.updates
    values["training"]["updates"] = updates
    return validate(values)


def evaluate(config: RunConfig) -> dict[str, float]:
    """Success of `model.path` on the held-out seeds; starts only policy servers and workers. Raises `CosoError`."""
    from cluster.launch.ray_runtime import ray_session
    from cluster.run.collection import SynchronousCollector
    from cluster.run.rollout_actors import evaluation_actors
    from cluster.run.supervision import Supervisor
    from cluster.run.system import require_model
    from cluster.telemetry.console import Console
    from cluster.telemetry.summaries import episode_metrics

    config = absolute_paths(config)
    preflight(config)
    require_model(config, trained=False)
    # Always in lock-step, so that the same model gives the same result.
    config = validate({**config.model_dump(), "mode": "sync"})

    async def measure(temporary: Path) -> dict[str, float]:
        from actors.rollouts.episode import EVALUATION_SEED_BASE

        supervisor = Supervisor(config.cluster.max_recoveries, config.cluster.recovery_window_s)
        workers = await evaluation_actors(config, temporary, supervisor)
        seeds = range(EVALUATION_SEED_BASE, EVALUATION_SEED_BASE + config.training.evaluation_episodes)
        try:
            collector = SynchronousCollector(config, workers)
            result = await supervisor.guard(collector.evaluate(seeds, config.training.evaluation_temperature))
        finally:
            await supervisor.close()
            await asyncio.gather(*(_await(worker.stop.remote()) for worker in workers), return_exceptions=True)
        row = episode_metrics(result.episodes, "evaluation")
        row["evaluation/environment_failures"] += result.failed
        return row

    # The console writes to standard error; standard output holds only the JSON, so that it can be redirected.
    title = f"eval {config.model.path}"
    with Console(title, 0, config.logging.console, sys.stderr) as console, ray_session(config) as temporary:
        console.stage(f"evaluating on {config.training.evaluation_episodes} held-out episodes")
        return asyncio.run(measure(temporary))


def _run(config: RunConfig, run: RunFolder, progress: Progress | None) -> Summary:
    """Run from a prepared folder to the report. progress: the state of a resumed run, None for a new one."""
    from cluster.launch.ray_runtime import ray_session
    from cluster.telemetry.console import Console
    from cluster.telemetry.metrics import MetricsWriter

    expected = expected_failures()
    title = f"{config.name} · {config.mode} · entropy {config.entropy.mode} · seed {config.seed}"
    run.summary.unlink(missing_ok=True)
    resumed_from = None if progress is None else progress.update
    try:
        try:
            writer = MetricsWriter(run.path, config, resumed_from)
        except CosoError:
            if progress is None:
                run.discard()  # it holds nothing yet, and would stand in the way of the next try
            raise
        try:
            with Console(title, config.training.updates, config.logging.console) as console:
                console.stage("starting Ray")
                with ray_session(config, run.logs) as temporary:
                    summary = asyncio.run(_controlled(config, run, progress or Progress(), writer, console, temporary))
        finally:
            writer.close()
        replace_text(run.summary, json.dumps(summary, indent=1))
        from cluster.report.page import write_report

        write_report(run.path)
        return summary
    except CosoError:
        raise
    except expected as error:
        reason = getattr(error, "cause", None) or error
        saved = (
            f"continue with `coso resume {run.path}`" if run.checkpoint_updates() else "no checkpoint was written yet"
        )
        logs = f"; the actors' output is in {run.logs}" if run.logs.exists() else ""
        raise CosoError(f"{str(reason).strip() or type(reason).__name__}\n({saved}{logs})") from error


def expected_failures() -> tuple[type[BaseException], ...]:
    """Errors of the stages that are caused from outside the program; their message explains them."""
    from ray.exceptions import RayError

    from actors.serving.weight_transfer import WeightTransferError
    from actors.trajectory import UnreadableTrajectory
    from learner.checkpoints.format import CheckpointMismatch, CheckpointWriteFailed
    from learner.finite import NotFinite
    from learner.group import LearnerFailed
    from scoring.pool.scorers import ScoringError

    stages = (
        LearnerFailed,
        NotFinite,
        CheckpointMismatch,
        CheckpointWriteFailed,
        ScoringError,
        WeightTransferError,
        UnreadableTrajectory,
    )
    return (*stages, RayError, TimeoutError, OSError)


async def _controlled(
    config: RunConfig, run: RunFolder, progress: Progress, writer: Any, console: Any, temporary: Path
) -> Summary:
    from cluster.run.controller import Controller
    from cluster.run.system import System

    started = time.monotonic()
    system = await System.start(config, run, progress, temporary, console)
    try:
        controller = Controller(config, run, system, progress, writer, console)
        await system.supervisor.guard(controller.run())
        if not controller.evaluations.last:  # resumed after the last update, before the summary
            await controller.evaluations.measure(progress.update)
        final = controller.evaluations.last
        recoveries = {kind: number for kind, number in system.supervisor.recoveries.items() if number}
        return {
            "success_before": progress.success_before,
            "success_after": final["evaluation/success"],
            "task_success_after": final["evaluation/task_success"],
            "evaluation_note": f"{int(final['evaluation/episodes'])} held-out episodes, return > 0",
            "eval_episodes": int(final["evaluation/episodes"]),
            "env_steps": progress.environment_steps,
            "steps_trained": progress.steps_trained,
            "steps_dropped": progress.steps_dropped,
            "updates": progress.update,
            "wall_seconds": round(
                controller.wall_seconds() if progress.wall_seconds else time.monotonic() - started, 1
            ),
            "recoveries": sum(recoveries.values()),
            "recoveries_by_kind": recoveries,
            "mode": config.mode,
            "entropy_mode": config.entropy.mode,
            "seed": config.seed,
            "report": str(run.report),
        }
    finally:
        await system.close()


async def _await(reference: Any) -> Any:
    return await reference
