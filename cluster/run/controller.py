"""The loop: (collect → score → update → publish → evaluate → checkpoint)*.

Update k trains on batch k and produces policy version k; version 0 is the model the run started from. In `sync` mode
each stage waits for the one before it, and the seed determines the run. In `async` mode the batch of update k + 1 is
collected and scored while the learner runs update k, and version k is evaluated while the learner runs update k + 1:
version k + 1 is published once that evaluation is over. Its figures are a second row of update k in the metrics.

Every batch is written to the run's log before training on it. If the learner or the driver dies, the batches since the
last checkpoint are read back from the log and not collected again. A learner that fails twice in the same way without
progress in between ends the run, and so does what is not finite (`learner.finite`), at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import psutil

from actors.trajectory import TrajectoryBatch, TrajectoryLog
from cluster.config.run_config import RunConfig
from cluster.run.evaluation import Evaluations
from cluster.run.run_folder import Progress, RunFolder
from cluster.run.system import System
from cluster.telemetry.console import Console
from cluster.telemetry.metrics import MetricsWriter, read_metrics
from cluster.telemetry.summaries import episode_metrics, lag_metrics, policy_calibration
from learner.group import LearnerFailed

Metrics = dict[str, float]


class Controller:
    """Runs updates `progress.update + 1 … training.updates` on a started system."""

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        system: System,
        progress: Progress,
        writer: MetricsWriter,
        console: Console,
    ) -> None:
        self._config = config
        self._run = run
        self._system = system
        self._progress = progress
        self._steps_before = progress.environment_steps  # taken before this process began
        self._steps_at = run.read_steps()
        self._writer = writer
        self._console = console
        self._log = TrajectoryLog(run.trajectories)
        self._logged = set(self._log.updates())
        self._started = time.monotonic() - progress.wall_seconds
        self._checkpointed = progress.update
        self._busy_before: Metrics = {}
        self._last_checkpoint: Metrics = {}  # for the next row, since a row is written before its checkpoint
        self.evaluations = Evaluations(config, system, console)

    async def run(self) -> None:
        """Train up to the last update. If this raises, logged batches and checkpoints remain."""
        try:
            await self._train()
            await self._finish_evaluation(learner_is_ahead=False)
        finally:
            self.evaluations.cancel()

    async def _train(self) -> None:
        await self._begin()
        upcoming = self._prepare_ahead(self._progress.update + 1)
        for update in range(self._progress.update + 1, self._config.training.updates + 1):
            started = time.monotonic()
            with self._system.waiting_for_scores():
                batch, row = await upcoming
            row["time/wait"] = time.monotonic() - started
            if self._system.collector.overlaps:
                upcoming = self._prepare_ahead(update + 1)
            async with self._system.between_versions:
                row |= await self._learn(update, batch)
                row |= await self._finish_evaluation(learner_is_ahead=True)
                row |= await self._publish(update)
            row |= await self._check_sync(update)
            if not self._system.collector.overlaps:
                upcoming = self._prepare_ahead(update + 1)
            self._progress.update = update
            await self._count_steps(row)
            self._system.supervisor.progressed()
            if self.evaluations.lost or self._due(update, self._config.training.evaluate_every):
                row |= await self.evaluations.start(update)
            self._system.collector.trained(row.get("time/score", 0.0), time.monotonic() - started - row["time/wait"])
            row |= self._last_checkpoint
            self._last_checkpoint = {}
            row |= self._machine_metrics(row, batch, time.monotonic() - started)
            self._write(row)
            if self._due(update, self._config.training.checkpoint_every):
                await self._checkpoint()

    # ---------------------------------------------------------------- stages

    async def _begin(self) -> None:
        """Publish the checkpoint's weights in a resumed run, then let the rollouts start, then evaluate if that has not
        been done."""
        if (version := self._progress.update) > 0:
            async with self._system.between_versions:
                await self._publish(version)
            for update in (version - 1, version):  # the batches that the check would know, had the run gone on
                if self._check_is_due(version) and update in self._logged:
                    self._system.probe_with(await asyncio.to_thread(self._log.read, update))
            await self._check_sync(version)
        await self._system.start_rollouts(version)
        due = version == 0 or self._due(version, self._config.training.evaluate_every)
        evaluated = {row["update"] for row in read_metrics(self._run.metrics) if "evaluation/success" in row}
        if due and version not in evaluated:
            self._write_evaluation(await self.evaluations.start(version))

    def _prepare_ahead(self, update: int) -> Awaitable[tuple[TrajectoryBatch, Metrics]]:
        """Start preparing a batch. In sync mode nothing runs before it is awaited."""
        preparation = self._prepare(update)
        if update > self._config.training.updates:
            preparation.close()
            return asyncio.get_running_loop().create_future()
        return asyncio.ensure_future(preparation) if self._system.collector.overlaps else preparation

    async def _prepare(self, update: int) -> tuple[TrajectoryBatch, Metrics]:
        """Collect and score the batch of an update, or read it from the log if it was logged before."""
        row: Metrics = {}
        with _timed(row, "time/collect"):
            if replayed := update in self._logged:
                batch = await asyncio.to_thread(self._log.read, update)
                self._recall_steps(update, batch, row)
            else:
                self._stage(f"collecting episodes for update {update}")
                batch, collected = await self._system.collector.collect(update)
                row |= collected
        # The learner processes the images while the batch is scored and, in async mode, while it trains on another.
        await asyncio.to_thread(self._system.learner.prepare, batch, update - 1)
        row |= episode_metrics(batch, "rollout") | policy_calibration(batch)
        if self._config.entropy.needs_influence:
            with _timed(row, "time/score"):
                batch, scores = await asyncio.to_thread(self._system.score, batch, update, replayed)
            row |= scores
            for kind, total in self._system.scoring_recoveries().items():
                self._system.supervisor.count_total(kind, total)
        if not replayed:
            self._run.require_space()
            await self._note_steps(update, row)
            row["bytes/log"] = await asyncio.to_thread(self._log.write, update, batch)
            self._logged.add(update)
        row["bytes/batch"] = batch.nbytes
        return batch, row

    async def _learn(self, update: int, batch: TrajectoryBatch) -> Metrics:
        row: Metrics = {}
        if self._check_is_due(update):
            self._system.probe_with(batch)
        self._stage(f"update {update}: training on {len(batch)} steps")
        limit = self._config.max_policy_lag if self._system.collector.overlaps else None
        row |= lag_metrics(batch, update - 1, limit)
        with _timed(row, "time/update"):
            trained = await self._with_learner(lambda: self._system.learner.update(batch, update - 1), update - 1)
        row |= {f"learner/{name}": value for name, value in trained.items()}
        return row

    async def _publish(self, version: int) -> Metrics:
        """Load version `version` into every policy server."""
        row: Metrics = {}
        self._stage(f"publishing weights, version {version}")
        with _timed(row, "time/publish"):
            row |= await self._with_learner_async(lambda: self._system.publish(version), version)
        return row

    async def _check_sync(self, version: int) -> Metrics:
        """If it is due, compare a live engine's log-probabilities with the learner's."""
        row: Metrics = {}
        if self._check_is_due(version):
            with _timed(row, "time/sync_check"):
                row |= await self._with_learner_async(lambda: self._system.check_sync(version), version)
        return row

    def _check_is_due(self, version: int) -> bool:
        every = self._config.weight_sync.check_every
        return bool(every) and version % every == 0

    async def _finish_evaluation(self, learner_is_ahead: bool) -> Metrics:
        """Wait for the evaluation under way, since the next weights must not change what it measures, and write its
        figures as a row of the version that it measured. Returns how long that took."""
        row: Metrics = {}
        with _timed(row, "time/evaluation_wait"):
            figures = await self.evaluations.finish(learner_is_ahead)
        self._write_evaluation(figures)
        return row if figures else {}

    def _write_evaluation(self, figures: Metrics) -> None:
        """Write a row of the present version's evaluation, if there are figures."""
        if not figures:
            return
        if self._progress.update == 0:
            self._progress.success_before = figures["evaluation/success"]
        self._write(figures)

    async def _checkpoint(self) -> None:
        """Write learner, SCM and progress, so that `resume` continues the run exactly."""
        self._stage("writing a checkpoint")
        self._run.require_space()
        folder = self._run.checkpoint_path(self._progress.update)
        with _timed(self._last_checkpoint, "time/checkpoint"):
            await self._with_learner(
                lambda: self._system.learner.save_checkpoint(folder / "learner"), self._progress.update
            )
            if self._config.entropy.needs_influence:
                await asyncio.to_thread(self._system.save_scm, folder)
            self._progress.wall_seconds = time.monotonic() - self._started
            self._progress.recoveries = dict(self._system.supervisor.recoveries)
            self._run.finish_checkpoint(self._progress, self._config.training.keep_checkpoints)
        self._checkpointed = self._progress.update

    # ---------------------------------------------------------------- recovery of the learner

    async def _with_learner(self, call: Callable[[], Any], trained: int) -> Any:
        """Call the learner in a thread, for what needs its optimizer. If a rank dies, restore the learner's state after
        `trained` updates and call again."""
        return await self._with_learner_async(lambda: self._system.in_learners_turn(call), trained)

    async def _with_learner_async(self, call: Callable[[], Awaitable[Any]], trained: int) -> Any:
        while True:
            try:
                return await call()
            except LearnerFailed as failure:
                self._system.supervisor.failed("learner", str(failure))
                self._console.message(f"{failure}; restarting the learner from update {self._checkpointed}")
                await self._system.in_learners_turn(lambda: self._restore_learner(trained))

    def _restore_learner(self, trained: int) -> None:
        """Restart the learner from the last checkpoint, then train again on the logged batches since."""
        while True:
            try:
                folder = self._run.checkpoint_path(self._checkpointed) / "learner" if self._checkpointed else None
                self._system.restart_learner(folder)
                for update in range(self._checkpointed + 1, trained + 1):
                    self._system.learner.update(self._log.read(update), update - 1)
                return
            except LearnerFailed as failure:
                self._system.supervisor.failed("learner", str(failure))
                self._console.message(f"{failure}; restarting the learner again")

    # ---------------------------------------------------------------- bookkeeping

    def _due(self, update: int, every: int) -> bool:
        return update == self._config.training.updates or bool(every and update % every == 0)

    def _stage(self, text: str) -> None:
        self._console.stage(text)

    async def _steps_taken(self) -> int:
        return self._steps_before + await self._system.steps_taken()

    async def _note_steps(self, update: int, row: Metrics) -> None:
        """Keep the counts of a batch that is about to be logged, for a resumed run that reads it from the log."""
        dropped = int(row.get("lag/dropped_steps", 0))
        self._steps_at[update] = {"taken": await self._steps_taken(), "dropped": dropped}
        await asyncio.to_thread(self._run.write_steps, self._steps_at)

    def _recall_steps(self, update: int, batch: TrajectoryBatch, row: Metrics) -> None:
        """Count the steps that an interrupted process took for a logged batch."""
        # A run of an earlier version noted nothing; its count was of the steps trained on.
        counts = self._steps_at.get(update, {"taken": self._steps_before + len(batch), "dropped": 0})
        self._steps_before = max(self._steps_before, counts["taken"])
        if counts["dropped"]:
            row["lag/dropped_steps"] = counts["dropped"]

    async def _count_steps(self, row: Metrics) -> None:
        """Count the steps taken, trained on and dropped up to this update; `row` holds those of the update."""
        progress = self._progress
        progress.environment_steps = await self._steps_taken()
        progress.steps_trained += int(row["steps/trained"])
        progress.steps_dropped += int(row["steps/dropped"] + row.get("lag/dropped_steps", 0))

    def _write(self, row: Metrics) -> None:
        row = {
            **row,
            "update": self._progress.update,
            "environment_steps": self._progress.environment_steps,
            "steps/trained": self._progress.steps_trained,
            "steps/dropped": self._progress.steps_dropped,
            "recoveries": float(sum(self._system.supervisor.recoveries.values())),
        }
        self._writer.write(row)
        self._console.update(row)

    def _machine_metrics(self, done: Metrics, batch: TrajectoryBatch, seconds: float) -> Metrics:
        """Speed over the whole update, busy share of every stage, memory of this process and of every watched actor.
        done: the update's row so far. seconds: wall time of the update."""
        row: Metrics = {
            "time/total": seconds,
            "speed/env_steps_per_s": len(batch) / seconds,
            "speed/tokens_per_s": batch.generated_tokens / seconds,
            "memory/driver_mb": psutil.Process().memory_info().rss / 2**20,
            "memory/host_used_mb": psutil.virtual_memory().used / 2**20,
            "mean_seconds/generate": float(np.mean(batch.column("generate_seconds"))),
            "mean_seconds/environment": float(np.mean(batch.column("environment_seconds"))),
        }
        row |= self._busy_shares(done, seconds)
        for name, status in self._system.supervisor.status.items():
            if "rss_bytes" in status:
                row[f"memory/{name.replace(' ', '_')}_mb"] = status["rss_bytes"] / 2**20
            for reason, count in status.get("failures", {}).items():
                row[f"failures/{reason}"] = row.get(f"failures/{reason}", 0.0) + count
        return row

    def _busy_shares(self, done: Metrics, seconds: float) -> Metrics:
        """Share of the update's wall time during which each stage was busy, averaged over its members. For servers and
        environments it is taken from their last status, so it is exact over many updates but not over one."""
        config = self._config
        totals = {"policy server": 0.0, "rollout worker": 0.0}
        for name, status in self._system.supervisor.status.items():
            totals[name.rsplit(" ", 1)[0]] += status.get("busy_seconds", status.get("environment_seconds", 0.0))
        since = {kind: max(0.0, total - self._busy_before.get(kind, total)) for kind, total in totals.items()}
        self._busy_before = totals
        environments = config.rollout.workers * config.rollout.envs_per_worker
        return {
            "busy/policy_servers": since["policy server"] / seconds / config.policy_server.replicas,
            "busy/environments": since["rollout worker"] / seconds / environments,
            "busy/learner": done.get("time/update", 0.0) / seconds,
            "busy/scorers": done.get("time/scorers_busy", 0.0) / seconds / config.scoring.workers,
        }

    def wall_seconds(self) -> float:
        """Wall time of the run, without the time between an interruption and its resume."""
        return time.monotonic() - self._started


class _timed:
    """Adds the seconds spent in the block to a row."""

    def __init__(self, row: Metrics, key: str) -> None:
        self._row, self._key = row, key

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._row[self._key] = self._row.get(self._key, 0.0) + time.monotonic() - self._begun
