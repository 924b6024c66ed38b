"""Run folders that another version wrote: each file with a schema of its own is refused in one line that names both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from actors.trajectory import SchemaMismatch, TrajectoryBatch, TrajectoryLog
from cluster.config.files import validate
from cluster.demonstrations.warm_start import read_demonstrations
from cluster.errors import CosoError
from cluster.run.run_folder import Progress, RunFolder
from cluster.training import resume
from learner.checkpoints.format import CheckpointMismatch, read_record

OLD_CONFIGS = Path(__file__).parents[1] / "config" / "old"


@pytest.fixture()
def run(tmp_path: Path) -> RunFolder:
    """A run with a finished checkpoint of update 4, and no process in it."""
    run = RunFolder.create(validate({"folder": str(tmp_path), "name": "run"}))
    run.checkpoint_path(4).mkdir(parents=True)
    run.finish_checkpoint(Progress(4), keep=1)
    run.unlock()
    return run


def one_line(error: BaseException) -> str:
    (line,) = str(error).splitlines()
    return line


@pytest.mark.parametrize("schema", [0, 2, "none"])
def test_a_checkpoint_of_another_schema_stops_a_resume_before_anything_starts(run: RunFolder, schema: object) -> None:
    path = run.checkpoint_path(4) / "progress.json"
    values = json.loads(path.read_text())
    del values["schema_version"]
    path.write_text(json.dumps(values if schema == "none" else {**values, "schema_version": schema}))
    with pytest.raises(CosoError) as error:
        resume(run.path)
    shown = "None" if schema == "none" else schema
    assert f"{path} has schema {shown}; this program reads 1. Resume with the version" in one_line(error.value)


def test_a_run_whose_config_has_a_key_that_is_gone_says_which(run: RunFolder) -> None:
    shutil.copy(OLD_CONFIGS / "42f425f.yaml", run.path / "config.yaml")
    with pytest.raises(
        CosoError, match=r"'cluster\.start_deadline_s' \(in .*run/config\.yaml\) has no effect any more"
    ):
        resume(run.path)


def test_a_learner_checkpoint_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "learner.json").write_text(json.dumps({"schema_version": 0, "signature": {}, "update": 1}))
    with pytest.raises(CheckpointMismatch, match="schema 0; this program reads 2. Load it with the version") as error:
        read_record(tmp_path)
    one_line(error.value)


def test_trajectories_and_demonstrations_of_another_schema_are_refused(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path / "demonstrations")
    log.write(0, TrajectoryBatch.from_rows([], {}))
    path = log.batch_path(0)
    pq.write_table(pq.read_table(path).replace_schema_metadata({"coso.schema_version": "0"}), path)
    with pytest.raises(SchemaMismatch, match="trajectory schema 0; this program reads 2. Read it with") as error:
        read_demonstrations(str(tmp_path))
    one_line(error.value)
