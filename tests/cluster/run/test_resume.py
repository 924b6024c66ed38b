"""What a resumed run goes on with: the config in its folder, and learning rates that an extension does not change."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import training
from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.launch.learner import learner_setup
from cluster.run.run_folder import Progress, RunFolder
from learner.schedules import learning_rate


class Killed(BaseException):
    """Stands for a kill of the process, after which nothing of it is left but its files."""


@pytest.fixture()
def run(tmp_path: Path) -> RunFolder:
    """A run of 25 updates, at its checkpoint of update 20."""
    config = validate({"folder": str(tmp_path), "name": "run", "training": {"updates": 25}})
    run = RunFolder.create(config)
    run.checkpoint_path(20).mkdir(parents=True)
    run.finish_checkpoint(Progress(20), keep=2)
    run.unlock()
    return run


def rates(config: RunConfig, updates: int) -> list[float]:
    total = learner_setup(config).total_updates
    return [learning_rate(config.learner, update, total) for update in range(updates)]


def test_an_extended_run_stays_extended_though_it_is_killed_at_once(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[RunConfig] = []

    def killed(config: RunConfig, *_: object) -> None:
        started.append(config)
        raise Killed

    monkeypatch.setattr(training, "_run", killed)
    for updates in (50, None, 40):  # 40 is less than the run has by now
        with pytest.raises(Killed):
            training.resume(run.path, updates)
        assert started[-1].training.updates == run.config().training.updates == 50
        assert started[-1] == run.config()


def test_extending_a_run_changes_no_learning_rate(run: RunFolder) -> None:
    before = run.config()
    longer = training.extended(before, 50)
    longest = training.extended(longer, 80)
    assert longest.training.updates == 80 and longest.learner.schedule_updates == 25
    assert rates(longer, 25) == rates(longest, 25) == rates(before, 25)
    assert set(rates(longest, 80)[24:]) == {before.learner.final_learning_rate}


def test_a_schedule_may_span_more_than_the_run() -> None:
    config = validate({"training": {"updates": 5}, "learner": {"schedule_updates": 9}})
    assert learner_setup(config).total_updates == 9
    assert learner_setup(training.extended(config, 7)).total_updates == 9
