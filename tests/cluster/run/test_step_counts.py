"""Steps taken, trained on and dropped: counted over an interruption, each of them once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.config.files import validate
from cluster.run.controller import Controller
from cluster.run.run_folder import Progress, RunFolder
from tests.actors.episodes import episode


class Taken:
    """What the workers of one process of the run have taken."""

    steps = 0

    async def steps_taken(self) -> int:
        return self.steps


def controller(run: RunFolder, progress: Progress) -> tuple[Controller, Taken]:
    """A controller of which only the counting is used: nothing else of a system, a writer or a console is there."""
    system: Any = Taken()
    nothing: Any = SimpleNamespace()
    return Controller(run.config(), run, system, progress, nothing, nothing), system


def test_every_step_is_counted_once_also_over_an_interruption(tmp_path: Path) -> None:
    run = RunFolder.create(validate({"folder": str(tmp_path), "name": "run", "mode": "async"}))

    async def scenario() -> None:
        progress = Progress()
        first, taken = controller(run, progress)
        # Update 1 trains on 90 of its 100 steps, 10 give context only, and an episode of 7 was dropped for it.
        taken.steps = 120
        await first._note_steps(1, {"lag/dropped_steps": 7})
        taken.steps = 150
        await first._count_steps({"steps/trained": 90.0, "steps/dropped": 10.0, "lag/dropped_steps": 7})
        assert (progress.environment_steps, progress.steps_trained, progress.steps_dropped) == (150, 90, 17)
        checkpoint = Progress(1, 150, steps_trained=90, steps_dropped=17)
        # Update 2 is logged, and trained on when the run is killed.
        taken.steps = 260
        await first._note_steps(2, {"lag/dropped_steps": 5})

        resumed, taken = controller(run, checkpoint)
        row: dict[str, float] = {}
        resumed._recall_steps(2, episode("logged", [0.0] * 100), row)
        taken.steps = 30  # by the new process, beside the 260 of the one before
        await resumed._count_steps({"steps/trained": 95.0, "steps/dropped": 5.0, **row})
        assert (checkpoint.environment_steps, checkpoint.steps_trained, checkpoint.steps_dropped) == (290, 185, 27)

    asyncio.run(scenario())


def test_a_logged_batch_of_a_version_that_noted_nothing_counts_with_its_steps(tmp_path: Path) -> None:
    run = RunFolder.create(validate({"folder": str(tmp_path), "name": "run"}))

    async def scenario() -> None:
        progress = Progress(3, 600)
        resumed, taken = controller(run, progress)
        resumed._recall_steps(4, episode("logged", [0.0] * 100), {})
        resumed._recall_steps(5, episode("next", [0.0] * 50), {})
        taken.steps = 1
        await resumed._count_steps({"steps/trained": 100.0, "steps/dropped": 0.0})
        assert progress.environment_steps == 751

    asyncio.run(scenario())
