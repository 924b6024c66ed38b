"""Evaluations of versions of the policy on the held-out seeds; in async mode, beside the update that follows."""

from __future__ import annotations

import asyncio
import time

from actors.rollouts.episode import EVALUATION_SEED_BASE
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.run.system import System
from cluster.telemetry.console import Console
from cluster.telemetry.summaries import episode_metrics

Metrics = dict[str, float]

#: How often the wait for an evaluation looks whether it can still finish, seconds.
POLL_S = 1.0


class Evaluations:
    """At most one is under way. Policy servers must serve its version until it is over.

    last: figures of the last one that is over. lost: the last one was given up, so the next version should be
    evaluated.
    """

    def __init__(self, config: RunConfig, system: System, console: Console) -> None:
        self._training = config.training
        self._system = system
        self._console = console
        self._task: asyncio.Task[Metrics] | None = None
        self._version = 0  # of the one under way
        self._server_restarts = 0  # before it began
        self.last: Metrics = {}
        self.lost = False

    async def start(self, version: int) -> Metrics:
        """In sync mode, evaluate and return the figures. In async mode, begin; `finish` returns the figures."""
        self.lost = False
        if not self._system.collector.overlaps:
            return await self.measure(version)
        self._version = version
        self._server_restarts = self._system.supervisor.recoveries["policy server"]
        self._task = asyncio.create_task(self.measure(version))
        return {}

    async def finish(self, learner_is_ahead: bool) -> Metrics:
        """Wait for the evaluation under way; returns its figures, or nothing if there is none or it was lost.

        learner_is_ahead: the learner has the next version already. Then a server that restarts cannot be sent the
        evaluated one where weights are broadcast, and the evaluation is given up.
        """
        if (task := self._task) is None:
            return {}
        self._console.stage(f"waiting for the evaluation of version {self._version}")
        while not (await asyncio.wait({task}, timeout=POLL_S))[0]:
            restarts = self._system.supervisor.recoveries["policy server"]
            if learner_is_ahead and self._system.broadcasts and restarts > self._server_restarts:
                self.cancel()
                self.lost = True
                self._console.message(
                    f"a policy server restarted while version {self._version} was evaluated and cannot be sent it "
                    "again: the next version is evaluated instead"
                )
                return {}
        self._task = None
        return task.result()

    def cancel(self) -> None:
        """End the evaluation under way, if any."""
        if self._task is not None:
            self._task.cancel()
        self._task = None

    async def measure(self, version: int) -> Metrics:
        """Success of the policy on the held-out seeds, which are the same for all runs. Raises `CosoError` unless
        `version` alone made every answer."""
        self._console.stage(f"evaluating on {self._training.evaluation_episodes} held-out episodes")
        seeds = range(EVALUATION_SEED_BASE, EVALUATION_SEED_BASE + self._training.evaluation_episodes)
        begun = time.monotonic()
        result = await self._system.collector.evaluate(seeds, self._training.evaluation_temperature)
        if not len(result.episodes):
            raise CosoError(f"evaluation has no episodes: the environments of all {len(seeds)} failed")
        spans = result.episodes.steps["policy_versions"].to_pylist()
        if others := {span["version"] for of_step in spans for span in of_step} - {version}:
            raise CosoError(f"the evaluation of version {version} has answers of the versions {sorted(others)}")
        row = {"time/evaluate": time.monotonic() - begun, **episode_metrics(result.episodes, "evaluation")}
        row["evaluation/environment_failures"] += result.failed
        self.last = row
        return row
