"""The run folder: nobody's work is overwritten, one process at a time, and a checkpoint is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch

from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.ray_runtime import short_temporary_folder, temporary_prefix
from cluster.run.run_folder import MINIMUM_FREE_BYTES, Progress, RunFolder
from learner.publish import SharedMemoryPublisher

ROOT = Path(__file__).parents[3]


def config(folder: Path, name: str = "run") -> RunConfig:
    return validate({"folder": str(folder), "name": name})


def create(folder: Path, overwrite: bool = False) -> RunFolder:
    return RunFolder.create(config(folder), overwrite)


# ---------------------------------------------------------------- the folder


def test_a_new_run_folder_holds_its_config_and_is_locked(tmp_path: Path) -> None:
    run = create(tmp_path / "not" / "yet" / "there")
    assert RunFolder.open_existing(run.path).config() == config(tmp_path / "not" / "yet" / "there")
    assert json.loads((run.path / "lock").read_text())["pid"] == os.getpid()
    run.unlock()
    assert not (run.path / "lock").exists()


def test_letting_go_removes_what_an_interrupted_ending_left(tmp_path: Path) -> None:
    """A second Ctrl-C breaks off the cleaning up of the first."""
    run = create(tmp_path)
    weights = SharedMemoryPublisher(run.weights_name, run.path).publish(1, [("weight", torch.zeros(1))])
    assert weights.path is not None and Path(weights.path).exists()
    run.unlock()
    assert not Path(weights.path).exists()


def test_a_run_folder_that_exists_is_left_alone_and_the_error_says_what_to_do(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.metrics.write_text("kept")
    with pytest.raises(CosoError) as error:
        create(tmp_path)
    for part in (str(run.path), f"coso resume {run.path}", "name=OTHER", "--overwrite"):
        assert part in str(error.value)
    assert run.metrics.read_text() == "kept"


def test_overwrite_replaces_a_run_and_all_it_left(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.metrics.write_text("old")
    assert not create(tmp_path, overwrite=True).metrics.exists()
    assert (run.path / "config.yaml").exists()


def test_overwrite_deletes_no_folder_that_is_no_run(tmp_path: Path) -> None:
    precious = tmp_path / "run" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(CosoError, match="not a run folder"):
        create(tmp_path, overwrite=True)
    assert precious.read_text() == "years of work"


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CosoError, match="file/run cannot be made"):
        create(tmp_path / "file")


def test_what_is_no_run_folder_cannot_be_resumed_or_reported(tmp_path: Path) -> None:
    with pytest.raises(CosoError, match="no config.yaml"):
        RunFolder.open_existing(tmp_path)


# ---------------------------------------------------------------- the lock


def test_a_run_that_a_living_process_holds_can_be_neither_taken_nor_overwritten(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.unlock()
    program = (
        "import sys\nfrom cluster.run.run_folder import RunFolder\n"
        "RunFolder.open_existing(sys.argv[1]).lock()\nprint('held', flush=True)\nsys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(run.path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        for claim in (run.lock, lambda: create(tmp_path, overwrite=True)):
            with pytest.raises(CosoError, match=f"in use by process {holder.pid}"):
                claim()
        assert (run.path / "config.yaml").exists()
    finally:
        holder.kill()
        holder.communicate()
    run.lock()  # its holder died without unlocking
    assert json.loads((run.path / "lock").read_text())["pid"] == os.getpid()


def test_a_process_that_only_has_the_number_of_the_one_that_died_does_not_count(tmp_path: Path) -> None:
    run = create(tmp_path)
    (run.path / "lock").write_text(json.dumps({"pid": os.getppid(), "started": 12345.0}))
    run.lock()
    assert json.loads((run.path / "lock").read_text())["pid"] == os.getpid()


def test_a_zombie_holds_no_run(tmp_path: Path) -> None:
    """It has ended, but its parent has not asked for its exit status, so its number and start time are still there."""
    run = create(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    try:
        process = psutil.Process(ended.pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        (run.path / "lock").write_text(json.dumps({"pid": ended.pid, "started": process.create_time()}))
        run.lock()
    finally:
        ended.wait(30)
    assert json.loads((run.path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '{"pid": null, "started": 1}', '{"pid": -3, "started": 1}'])
def test_a_lock_that_a_crash_cut_off_does_not_lock_for_ever(tmp_path: Path, text: str) -> None:
    run = create(tmp_path)
    (run.path / "lock").write_text(text)
    run.lock()
    assert json.loads((run.path / "lock").read_text())["pid"] == os.getpid()


# ---------------------------------------------------------------- the disk


def test_a_nearly_full_disk_stops_a_run_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the figure is made up, since a full disk cannot be had in a test.
    usage = namedtuple("usage", "total used free")
    run = create(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, MINIMUM_FREE_BYTES))
    run.require_space()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 5 << 20))
    with pytest.raises(CosoError) as error:
        run.require_space()
    for part in (str(run.path), "5 MiB free", "256 MiB are needed", f"coso resume {run.path}"):
        assert part in str(error.value)


# ---------------------------------------------------------------- checkpoints


def begin_checkpoint(run: RunFolder, update: int) -> Path:
    folder = run.checkpoint_path(update) / "learner"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    return folder


def test_a_checkpoint_of_the_version_that_counted_only_trained_steps_loads_with_them(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.checkpoint_path(5).mkdir(parents=True)
    run.finish_checkpoint(Progress(5, 2560), keep=2)
    path = run.checkpoint_path(5) / "progress.json"
    values = json.loads(path.read_text())
    del values["steps_trained"], values["steps_dropped"]
    path.write_text(json.dumps(values))
    progress = run.read_progress(5)
    assert (progress.environment_steps, progress.steps_trained, progress.steps_dropped) == (2560, 2560, 0)


def test_the_counts_of_steps_are_read_back_and_a_broken_file_is_named(tmp_path: Path) -> None:
    run = create(tmp_path)
    assert run.read_steps() == {}
    steps = {1: {"taken": 200, "dropped": 0}, 12: {"taken": 2400, "dropped": 7}}
    run.write_steps(steps)
    assert run.read_steps() == steps
    run.steps.write_text("{")
    with pytest.raises(CosoError, match=r"steps\.json cannot be read: .*remove it to resume"):
        run.read_steps()


def test_a_checkpoint_counts_once_it_is_whole_and_gives_its_progress_back(tmp_path: Path) -> None:
    run = create(tmp_path)
    assert run.checkpoint_updates() == []
    begin_checkpoint(run, 5)
    assert run.checkpoint_updates() == []  # interrupted here, it is not there
    progress = Progress(5, 2560, 12.5, 0.25, {"learner": 1, "policy server": 2}, steps_trained=2400, steps_dropped=90)
    run.finish_checkpoint(progress, keep=2)
    assert run.checkpoint_updates() == [5]
    assert run.read_progress(5) == progress


def test_only_the_newest_checkpoints_are_kept_and_interrupted_ones_do_not_count(tmp_path: Path) -> None:
    run = create(tmp_path)
    begin_checkpoint(run, 7)  # interrupted
    for update in (2, 9, 10, 100):
        begin_checkpoint(run, update)
        run.finish_checkpoint(Progress(update), keep=2)
    assert run.checkpoint_updates() == [10, 100]  # by number, not by name
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_10", "step_100", "step_7"]


def test_a_removal_that_was_interrupted_leaves_no_checkpoint_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create(tmp_path)
    for update in (1, 2):
        begin_checkpoint(run, update)
        run.finish_checkpoint(Progress(update), keep=2)
    begin_checkpoint(run, 3)

    def killed_here(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed_here)
    with pytest.raises(KeyboardInterrupt):
        run.finish_checkpoint(Progress(3), keep=2)
    assert run.checkpoint_path(1).exists() and run.checkpoint_updates() == [2, 3]


def test_a_folder_that_somebody_set_aside_is_no_checkpoint(tmp_path: Path) -> None:
    run = create(tmp_path)
    begin_checkpoint(run, 4)
    run.finish_checkpoint(Progress(4), keep=1)
    shutil.copytree(run.checkpoint_path(4), run.checkpoints / "step_4.mine")
    assert run.checkpoint_updates() == [4]


def test_a_checkpoint_of_another_version_or_unreadable_is_refused(tmp_path: Path) -> None:
    run = create(tmp_path)
    begin_checkpoint(run, 4)
    run.finish_checkpoint(Progress(4), keep=1)
    path = run.checkpoint_path(4) / "progress.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "schema_version": 999}))
    with pytest.raises(CosoError, match="schema 999.*reads 1"):
        run.read_progress(4)
    wrong = ({"moon_phase": 1}, {"update": "soon"}, {"recoveries": [1]}, {"steps_trained": 1.5})
    for text in (*(json.dumps({**values, **each}) for each in wrong), "7", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(CosoError, match="cannot be read"):
            run.read_progress(4)
    path.unlink()
    with pytest.raises(CosoError, match="cannot be read"):
        run.read_progress(4)


# ---------------------------------------------------------------- moved, linked


def test_overwrite_of_a_link_replaces_what_it_leads_to(tmp_path: Path) -> None:
    other_disk, kept = tmp_path / "disk" / "run", tmp_path / "kept"
    (tmp_path / "runs").mkdir()
    other_disk.mkdir(parents=True)
    kept.mkdir()
    (kept / "mine").touch()
    (tmp_path / "runs" / "run").symlink_to(other_disk)
    config = validate({"folder": str(tmp_path / "runs"), "name": "run"})
    with pytest.raises(CosoError, match=r"no config\.yaml"):
        RunFolder.create(config, overwrite=True)
    (other_disk / "config.yaml").write_text("name: run\n")
    (other_disk / "checkpoints").symlink_to(kept)
    (other_disk / "trajectories").mkdir()
    run = RunFolder.create(config, overwrite=True)
    assert run.path.is_symlink() and {path.name for path in other_disk.iterdir()} == {"config.yaml", "lock"}
    assert (kept / "mine").exists()


def test_a_run_without_room_is_not_left_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "require_space", lambda self: (_ for _ in ()).throw(CosoError("the disk is full")))
    with pytest.raises(CosoError, match="full"):
        create(tmp_path)
    assert not list(tmp_path.rglob("lock"))


def test_what_a_run_left_is_not_mistaken_for_that_of_another_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    run = create(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as other:  # it has the number that the run's owner had
        living = Path(short_temporary_folder()) / f"{temporary_prefix(other.pid)}abc"
        living.mkdir()
        (run.path / "lock").write_text(json.dumps({"pid": other.pid, "started": 12345.0}))
        run.lock()
        assert living.is_dir()
        other.kill()
        other.wait()
        (run.path / "lock").write_text(json.dumps({"pid": other.pid, "started": 12345.0}))
        run.lock()
        assert not living.exists()


def test_a_path_is_absolute_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(tmp_path).unlock()
    monkeypatch.chdir(tmp_path)
    run = RunFolder.open_existing("run")
    monkeypatch.chdir("/")
    assert run.path == tmp_path / "run" and run.config().name == "run"


def checkpoint(run: RunFolder, update: int) -> None:
    model = run.checkpoint_path(update) / "learner" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(f'"{update}"')
    run.finish_checkpoint(Progress(update), keep=1)


def test_a_whole_checkpoint_takes_the_place_of_a_model_that_is_gone(tmp_path: Path) -> None:
    model = tmp_path / "start"
    model.mkdir()
    config = validate({"folder": str(tmp_path), "name": "run", "model": {"path": str(model)}})
    run = RunFolder.create(config)
    checkpoint(run, 1)
    assert run.with_model(config, 1) == config
    model.rmdir()
    assert run.with_model(config, 0) == config  # there is nothing to go on with
    resumed = run.with_model(config, 1)
    assert resumed.model.path == str(run.path / "model")
    checkpoint(run, 2)  # the first one is removed
    assert (run.path / "model" / "config.json").read_text() == '"1"'
    moved = RunFolder(run.path.rename(tmp_path / "moved"))
    assert moved.with_model(resumed, 2).model.path == str(tmp_path / "moved" / "model")


def test_adapters_need_the_model_that_they_were_trained_on(tmp_path: Path) -> None:
    config = validate(
        {"folder": str(tmp_path), "name": "run", "model": {"path": str(tmp_path / "no")}, "learner": {"lora": {}}}
    )
    run = RunFolder.create(config)
    checkpoint(run, 1)
    with pytest.raises(CosoError, match=r"adapters .*config\.yaml"):
        run.with_model(config, 1)


def test_a_name_of_the_hub_is_not_a_folder_that_is_gone(tmp_path: Path) -> None:
    config = validate({"folder": str(tmp_path), "name": "run", "model": {"path": "org/model"}})
    run = RunFolder.create(config)
    checkpoint(run, 1)
    assert run.with_model(config, 1) == config
