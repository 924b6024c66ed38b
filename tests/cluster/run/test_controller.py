"""The loop's order: what must be over before what begins, which failures it survives, and whose figures are whose.

The stages are plain objects that note when they are called, so every order of events can be had at once; run folder,
log, metrics and supervisor are the real ones. Whole runs are in tests/cluster/test_end_to_end.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.images import PngEncoder
from actors.rollouts.worker import EvaluationResult
from actors.trajectory import TrajectoryBatch
from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.run import evaluation
from cluster.run.controller import Controller
from cluster.run.run_folder import Progress, RunFolder
from cluster.run.supervision import Supervisor
from cluster.telemetry.console import Console
from cluster.telemetry.metrics import MetricsWriter, read_metrics
from learner.finite import NotFinite
from learner.group import LearnerFailed
from tests.cluster.report.test_page import step
from tests.tiny_models import picture

KEY, PNG = PngEncoder().encode(picture(0))


def episode(name: str, version: int) -> TrajectoryBatch:
    rows = [
        step(name, number, KEY, policy_versions=[{"version": version, "start": 0}], generate_seconds=0.1,
             environment_seconds=0.1, finish_reason="stop", reward=1.0, seed=1)
        for number in range(2)
    ]  # fmt: skip
    return TrajectoryBatch.from_rows(rows, {KEY: PNG})


class Stages:
    """A system whose stages take no time, except for evaluations. `events`: what was called, in order."""

    broadcasts = False

    def __init__(self, config: RunConfig) -> None:
        self.events: list[str] = []
        self.prepared: list[int] = []  # indices of the updates whose batches the learner was shown ahead
        self.supervisor = Supervisor(20, 3600.0)
        self.between_versions = asyncio.Lock()
        self.overlaps = config.mode == "async"
        self.collector = self.learner = self
        self.version = 0
        self.evaluation_seconds = 0.0
        self.failures: dict[int, list[Exception]] = {}  # by update

    # the system
    async def start_rollouts(self, update: int) -> None:
        self.events.append("start rollouts")

    async def in_learners_turn(self, call: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(call)

    def probe_with(self, batch: TrajectoryBatch) -> None:
        self.events.append("probe")

    async def publish(self, version: int) -> dict[str, float]:
        self.events.append(f"publish {version}")
        self.version = version
        return {}

    async def check_sync(self, version: int) -> dict[str, float]:
        self.events.append(f"check {version}")
        return {}

    def restart_learner(self, checkpoint: Path | None) -> None:
        self.events.append("restart learner")

    async def steps_taken(self) -> int:
        return 2 * sum(event.startswith("learn") for event in self.events)

    @contextmanager
    def waiting_for_scores(self) -> Iterator[None]:
        yield

    # the collector
    def trained(self, scoring_s: float, busy_s: float) -> None:
        pass

    async def collect(self, update: int) -> tuple[TrajectoryBatch, dict[str, float]]:
        return episode(f"e{update}", self.version), {}

    async def evaluate(self, seeds: Any, temperature: float) -> EvaluationResult:
        begun = self.version
        self.events.append(f"evaluate {begun}")
        await asyncio.sleep(self.evaluation_seconds)
        self.events.append(f"evaluated {begun}")
        # Half of it is answered at the end, by whatever is served then.
        return EvaluationResult(
            TrajectoryBatch.concatenate([episode("first", begun), episode("last", self.version)]), 0
        )

    # the learner
    def prepare(self, batch: TrajectoryBatch, index: int) -> None:
        self.prepared.append(index)

    def update(self, batch: TrajectoryBatch, index: int) -> dict[str, float]:
        assert index in self.prepared
        if failures := self.failures.get(index + 1):
            raise failures.pop(0)
        self.events.append(f"learn {index + 1}")
        return {}

    def save_checkpoint(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.events.append(f"checkpoint {folder.parent.name}")


@pytest.fixture(params=["async", "sync"])
def config(tmp_path: Path, request: pytest.FixtureRequest) -> RunConfig:
    training = {"updates": 4, "evaluate_every": 2, "checkpoint_every": 2, "evaluation_episodes": 2}
    return validate(
        {"folder": str(tmp_path), "name": "run", "mode": request.param, "entropy": {"mode": "none"},
         "training": training}
    )  # fmt: skip


def train(config: RunConfig, run: RunFolder, prepare: Any = None, progress: Progress | None = None) -> Stages:
    """A run of the loop; prepare: is given the stages before it begins."""

    async def whole() -> Stages:
        stages = Stages(config)
        if prepare is not None:
            prepare(stages)
        writer = MetricsWriter(run.path, config, None if progress is None else progress.update)
        try:
            console = Console("test", config.training.updates, False)
            system: Any = stages
            await Controller(config, run, system, progress or Progress(), writer, console).run()
        finally:
            writer.close()
            stages_of_last_run.append(stages)
        return stages

    return asyncio.run(asyncio.wait_for(whole(), 60))


stages_of_last_run: list[Stages] = []


def test_evaluations_run_beside_training_but_never_across_a_publish(config: RunConfig) -> None:
    def slow(stages: Stages) -> None:
        stages.evaluation_seconds = 0.2

    run = RunFolder.create(config)
    events = train(config, run, slow).events
    for version in (0, 2, 4):
        begun, over = events.index(f"evaluate {version}"), events.index(f"evaluated {version}")
        during = events[begun + 1 : over]
        assert not [event for event in during if event.startswith("publish")]
        if version < 4:
            assert (f"learn {version + 1}" in during) == (config.mode == "async")
    rows = read_metrics(run.metrics)
    assert [row["update"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["update"] for row in rows if "evaluation/success" in row] == [0, 2, 4]
    waits = [row["update"] for row in rows if row.get("time/evaluation_wait", 0) > 0.05]
    assert waits == ([1, 3] if config.mode == "async" else [])


def test_an_evaluation_that_two_versions_answered_is_no_result(config: RunConfig) -> None:
    def swapped(stages: Stages) -> None:
        async def evaluate(*_: Any) -> EvaluationResult:
            return EvaluationResult(TrajectoryBatch.concatenate([episode("a", 0), episode("b", 1)]), 0)

        stages.evaluate = evaluate  # type: ignore[method-assign]

    with pytest.raises(CosoError, match=r"evaluation of version 0 has answers of the versions \[1\]"):
        train(config, RunFolder.create(config), swapped)


def test_where_weights_are_broadcast_a_lost_version_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server restarts while version 0 is evaluated and version 1 is learned: nobody can send it version 0."""
    monkeypatch.setattr(evaluation, "POLL_S", 0.01)
    config = validate({"folder": str(tmp_path), "name": "run", "entropy": {"mode": "none"}, "training": {"updates": 2}})

    def lossy(stages: Stages) -> None:
        stages.broadcasts = True
        stages.evaluation_seconds = 3600.0

        def update(batch: TrajectoryBatch, index: int) -> dict[str, float]:
            stages.evaluation_seconds = 0.0
            if index == 0:
                stages.supervisor.count("policy server")
            return {}

        stages.update = update  # type: ignore[method-assign]

    run = RunFolder.create(config)
    train(config, run, lossy)
    assert [row["update"] for row in read_metrics(run.metrics) if "evaluation/success" in row] == [1, 2]


def test_a_resumed_run_publishes_and_checks_its_weights_before_rollouts_start(config: RunConfig) -> None:
    run = RunFolder.create(config)
    train(config, run)
    kept = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join(line for line in kept if "evaluation/success" not in json.loads(line)) + "\n")
    stages = train(config, run, progress=run.read_progress(2))
    published, started = stages.events.index("publish 2"), stages.events.index("start rollouts")
    assert published == 0 and stages.events[1:started] == ["probe", "probe", "check 2"]
    # Its figures were lost, and are measured again before the next version is served.
    assert started < stages.events.index("evaluate 2") < stages.events.index("publish 3")


def test_one_failure_of_the_learner_is_survived_the_same_one_twice_is_not(config: RunConfig) -> None:
    def once(stages: Stages) -> None:
        stages.failures = {2: [LearnerFailed("update: rank 0 died (7)")], 3: [LearnerFailed("update: rank 0 died (8)")]}

    run = RunFolder.create(config)
    stages = train(config, run, once)
    assert stages.supervisor.recoveries["learner"] == 2 and read_metrics(run.metrics)[-1]["update"] == 4
    run.unlock()

    def always(stages: Stages) -> None:
        stages.failures = {3: [LearnerFailed(f"update: rank 0 failed: OutOfMemoryError: {n} MiB") for n in range(20)]}

    with pytest.raises(CosoError, match=r"twice in the same way without progress in between.*OutOfMemoryError: 1 MiB"):
        train(config, RunFolder.create(config, overwrite=True), always)
    assert stages_of_last_run[-1].events.count("restart learner") == 1


def test_numbers_that_are_not_finite_end_the_run_at_once(config: RunConfig) -> None:
    def broken(stages: Stages) -> None:
        stages.failures = {2: [NotFinite("weights are not finite (lm_head)")]}

    with pytest.raises(NotFinite, match="lm_head"):
        train(config, RunFolder.create(config), broken)
    assert "restart learner" not in stages_of_last_run[-1].events
