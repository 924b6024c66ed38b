"""`runs/NAME/`: what a run leaves on disk, and what a resumed run starts from.

config.yaml  metrics.jsonl  tensorboard/  trajectories/  checkpoints/step_N/  report.html  summary.json  logs/
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.config.files import load_config, to_yaml
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.telemetry.metrics import METRICS_FILE

CHECKPOINT_SCHEMA_VERSION = 1
#: A run is refused a start with less room than this on its disk, bytes.
MINIMUM_FREE_BYTES = 256 << 20


@dataclass
class Progress:
    """Where the controller's loop stands: what a checkpoint must remember besides learner and SCM."""

    update: int = 0
    environment_steps: int = 0
    wall_seconds: float = 0.0
    success_before: float | None = None
    recoveries: dict[str, int] = field(default_factory=dict)


class RunFolder:
    """One run's folder. Made with `create` or opened with `open_existing`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trajectories = path / "trajectories"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / METRICS_FILE
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.logs = path / "logs"  # what the actors printed, if the run failed

    @classmethod
    def create(cls, config: RunConfig, overwrite: bool = False) -> RunFolder:
        """Make the folder and write the resolved config into it. Raises `CosoError` if it exists and is in use."""
        run = cls(Path(config.folder) / config.name)
        if run.path.exists():
            if not overwrite:
                raise CosoError(
                    f"run folder {run.path} exists; continue it with `coso resume {run.path}`, start another with "
                    "name=OTHER, or replace it with --overwrite"
                )
            if not (run.path / "config.yaml").exists():
                raise CosoError(f"{run.path} is no run folder (it has no config.yaml), so --overwrite leaves it alone")
            run.lock()
            shutil.rmtree(run.path)
        try:
            run.path.mkdir(parents=True)
            (run.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        except OSError as error:
            raise CosoError(f"run folder {run.path} cannot be made: {error}") from None
        run.lock()
        run.require_space()
        return run

    @classmethod
    def open_existing(cls, path: str | Path) -> RunFolder:
        run = cls(Path(path))
        if not (run.path / "config.yaml").exists():
            raise CosoError(f"{path} is not a run folder: it has no config.yaml")
        return run

    def config(self) -> RunConfig:
        return load_config([self.path / "config.yaml"])

    def lock(self) -> None:
        """Claim the folder for this process, and remove what a former owner that was killed left on the machine.

        Raises `CosoError` while another living process holds it.
        """
        path = self.path / "lock"
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
            pid, started = int(owner["pid"]), float(owner["started"])
        except (OSError, ValueError, KeyError, TypeError):
            pid, started = os.getpid(), 0.0  # never locked, or what is written there is no lock
        if pid > 0 and pid != os.getpid():
            if _is_running(pid, started):
                raise CosoError(f"{self.path} is in use by process {pid}; wait for it or end it first")
            self._remove_leftovers(pid)
        mine = psutil.Process()
        path.write_text(json.dumps({"pid": mine.pid, "started": mine.create_time()}), encoding="utf-8")

    def weights_name(self, pid: int) -> str:
        """What the weight files of process `pid` for this run are called: unique on a machine."""
        return f"{self.path.name}-{pid}"

    def _remove_leftovers(self, pid: int) -> None:
        from cluster.launch.ray_runtime import short_temporary_folder, temporary_prefix
        from learner.publish import remove_weight_files

        remove_weight_files(self.weights_name(pid), self.path)
        for folder in Path(short_temporary_folder()).glob(temporary_prefix(pid) + "*"):
            shutil.rmtree(folder, ignore_errors=True)

    def unlock(self) -> None:
        """Let go of the folder. What an ending that was itself interrupted (a second Ctrl-C) left behind goes too."""
        self._remove_leftovers(os.getpid())
        (self.path / "lock").unlink(missing_ok=True)

    def require_space(self) -> None:
        """Raise `CosoError` when the disk is nearly full, before something is half written to it."""
        free = shutil.disk_usage(self.path).free
        if free < MINIMUM_FREE_BYTES:
            raise CosoError(
                f"the disk of {self.path} has {free >> 20} MiB free, {MINIMUM_FREE_BYTES >> 20} MiB are needed; "
                f"free some and continue with `coso resume {self.path}`"
            )

    # ---------------------------------------------------------------- checkpoints

    def checkpoint_path(self, update: int) -> Path:
        return self.checkpoints / f"step_{update}"

    def checkpoint_updates(self) -> list[int]:
        """Updates with a whole checkpoint, in order; one that was interrupted has no progress.json and is ignored."""
        names = [path.parent.name.removeprefix("step_") for path in self.checkpoints.glob("step_*/progress.json")]
        return sorted(int(name) for name in names if name.isdecimal())

    def finish_checkpoint(self, progress: Progress, keep: int) -> None:
        """Mark the checkpoint whole by writing its progress last, then remove the oldest beyond `keep`."""
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
        path = self.checkpoint_path(update) / "progress.json"
        try:
            values: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
            if (version := values.pop("schema_version", None)) != CHECKPOINT_SCHEMA_VERSION:
                raise CosoError(
                    f"checkpoint {path} has schema {version}; this program reads {CHECKPOINT_SCHEMA_VERSION}. "
                    "Resume with the version of coso-rl that wrote it."
                )
            return Progress(**values)
        except (OSError, ValueError, TypeError) as error:
            raise CosoError(f"checkpoint {path} cannot be read: {error}") from None


def _is_running(pid: int, started: float) -> bool:
    """Whether the process that began at `started` is still there (and not another with its number)."""
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.NoSuchProcess:
        return False
