"""`runs/NAME/`: the files of a run, from which a resumed run continues.

config.yaml  metrics.jsonl  steps.json  tensorboard/  trajectories/  checkpoints/step_N/  report.html  summary.json
logs/  wandb_id (with Weights & Biases)
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from pydantic import ConfigDict, TypeAdapter

from cluster.config.files import load_config, to_yaml
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.telemetry.metrics import METRICS_FILE

CHECKPOINT_SCHEMA_VERSION = 1
#: A run does not start or continue with less free disk space than this, bytes.
MINIMUM_FREE_BYTES = 256 << 20

#: Update -> "taken": steps that environments had made when its batch was logged; "dropped": those of episodes dropped
#: since the batch before.
StepsAtUpdate = dict[int, dict[str, int]]


@dataclass
class Progress:
    """The state of the controller's loop: what a checkpoint holds besides learner and SCM.

    environment_steps: made in training episodes, whatever became of them. steps_trained: of these, trained on.
    steps_dropped: of these, not trained on, since too old.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # for reading one

    update: int = 0
    environment_steps: int = 0
    wall_seconds: float = 0.0
    success_before: float | None = None
    recoveries: dict[str, int] = field(default_factory=dict)
    steps_trained: int = 0
    steps_dropped: int = 0


# A run folder may come from others: numbers that are none are found here and not in the middle of the run.
_STEPS = TypeAdapter(StepsAtUpdate)
_PROGRESS = TypeAdapter(Progress)


class RunFolder:
    """One run's folder. Made with `create` or opened with `open_existing`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trajectories = path / "trajectories"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / METRICS_FILE
        self.steps = path / "steps.json"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.logs = path / "logs"  # the actors' output, if the run failed

    @classmethod
    def create(cls, config: RunConfig, overwrite: bool = False) -> RunFolder:
        """Make the folder and write the resolved config into it.

        Raises `CosoError` if it exists (unless `overwrite`), is in use or cannot be made.
        """
        run = cls(Path(config.folder) / config.name)
        if run.path.exists():
            if not overwrite:
                raise CosoError(
                    f"run folder {run.path} exists; continue it with `coso resume {run.path}`, start another with "
                    "name=OTHER, or replace it with --overwrite"
                )
            if not (run.path / "config.yaml").exists():
                raise CosoError(
                    f"{run.path} is not a run folder (it has no config.yaml), so --overwrite does not replace it"
                )
            run.lock()
            shutil.rmtree(run.path)
        try:
            run.path.mkdir(parents=True)
            run.write_config(config)
        except OSError as error:
            raise CosoError(f"run folder {run.path} cannot be made: {error}") from None
        run.lock()
        run.require_space()
        return run

    @classmethod
    def open_existing(cls, path: str | Path) -> RunFolder:
        """Open the run folder at `path`. Raises `CosoError` if it is not a run folder."""
        run = cls(Path(path))
        if not (run.path / "config.yaml").exists():
            raise CosoError(f"{path} is not a run folder: it has no config.yaml")
        return run

    def config(self) -> RunConfig:
        """The run's config. Raises `CosoError` if it is invalid, for instance written by another version."""
        return load_config([self.path / "config.yaml"])

    def write_config(self, config: RunConfig) -> None:
        """Replace the run's config, at once: a crash leaves the old one or the new one. Raises `OSError`."""
        aside = self.path / "config.tmp"
        aside.write_text(to_yaml(config), encoding="utf-8")
        aside.rename(self.path / "config.yaml")

    def lock(self) -> None:
        """Lock the folder for this process, and remove what a killed earlier owner left on this machine.

        Raises `CosoError` while another living process holds it.
        """
        path = self.path / "lock"
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
            pid, started = int(owner["pid"]), float(owner["started"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pid, started = os.getpid(), 0.0  # never locked, or not a valid lock file
        if pid > 0 and pid != os.getpid():
            if _is_running(pid, started):
                raise CosoError(f"{self.path} is in use by process {pid}; wait for it or stop it first")
            self._remove_leftovers(pid)
        mine = psutil.Process()
        path.write_text(json.dumps({"pid": mine.pid, "started": mine.create_time()}), encoding="utf-8")

    def weights_name(self, pid: int) -> str:
        """Name of the weight files of process `pid` for this run, unique on a machine."""
        return f"{self.path.name}-{pid}"

    def _remove_leftovers(self, pid: int) -> None:
        from cluster.launch.ray_runtime import short_temporary_folder, temporary_prefix
        from learner.publish import remove_weight_files

        remove_weight_files(self.weights_name(pid), self.path)
        for folder in Path(short_temporary_folder()).glob(temporary_prefix(pid) + "*"):
            shutil.rmtree(folder, ignore_errors=True)

    def unlock(self) -> None:
        """Release the folder, and remove what an interrupted cleanup (a second Ctrl-C) left behind."""
        self._remove_leftovers(os.getpid())
        (self.path / "lock").unlink(missing_ok=True)

    def require_space(self) -> None:
        """Raise `CosoError` if the disk is nearly full, before a file is half written."""
        free = shutil.disk_usage(self.path).free
        if free < MINIMUM_FREE_BYTES:
            raise CosoError(
                f"the disk of {self.path} has {free >> 20} MiB free, {MINIMUM_FREE_BYTES >> 20} MiB are needed; "
                f"free some and continue with `coso resume {self.path}`"
            )

    # ---------------------------------------------------------------- steps

    def write_steps(self, steps: StepsAtUpdate) -> None:
        """Write how many steps were taken and dropped when each update's batch was logged."""
        aside = self.steps.with_suffix(".tmp")
        aside.write_text(json.dumps(steps), encoding="utf-8")
        aside.rename(self.steps)

    def read_steps(self) -> StepsAtUpdate:
        """What `write_steps` wrote last; {} for a new run and for one of an earlier version. Raises `CosoError`."""
        if not self.steps.exists():
            return {}
        try:
            return _STEPS.validate_python(json.loads(self.steps.read_text("utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise CosoError(f"{self.steps} cannot be read: {error}; remove it to resume without its counts") from None

    # ---------------------------------------------------------------- checkpoints

    def checkpoint_path(self, update: int) -> Path:
        """The folder of the checkpoint after `update`."""
        return self.checkpoints / f"step_{update}"

    def checkpoint_updates(self) -> list[int]:
        """Updates with a complete checkpoint, in order. An interrupted one has no progress.json and is ignored."""
        names = [path.parent.name.removeprefix("step_") for path in self.checkpoints.glob("step_*/progress.json")]
        return sorted(int(name) for name in names if name.isdecimal())

    def finish_checkpoint(self, progress: Progress, keep: int) -> None:
        """Complete the checkpoint by writing its progress last, then remove all but the latest `keep` checkpoints."""
        path = self.checkpoint_path(progress.update)
        aside = path / "progress.tmp"
        aside.write_text(
            json.dumps({"schema_version": CHECKPOINT_SCHEMA_VERSION, **asdict(progress)}, indent=1), encoding="utf-8"
        )
        aside.rename(path / "progress.json")
        for update in self.checkpoint_updates()[:-keep]:
            old = self.checkpoint_path(update)
            (old / "progress.json").unlink()
            shutil.rmtree(old)

    def read_progress(self, update: int) -> Progress:
        """Read a checkpoint's progress. Raises `CosoError` if it is unreadable or of another schema version."""
        path = self.checkpoint_path(update) / "progress.json"
        try:
            values: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
            if (version := values.pop("schema_version", None)) != CHECKPOINT_SCHEMA_VERSION:
                raise CosoError(
                    f"checkpoint {path} has schema {version}; this program reads {CHECKPOINT_SCHEMA_VERSION}. "
                    "Resume with the version of coso-rl that wrote it."
                )
            # Earlier versions counted only the steps trained on.
            values.setdefault("steps_trained", values.get("environment_steps", 0))
            return _PROGRESS.validate_python(values)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CosoError(f"checkpoint {path} cannot be read: {error}") from None


def _is_running(pid: int, started: float) -> bool:
    """Whether the process started at `started` is still running: not another one with the same pid, and no zombie,
    which is a process that has ended and whose parent has not asked for its exit status."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 1.0
        return same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
