"""`runs/NAME/`: the files of a run, from which a resumed run continues.

config.yaml  metrics.jsonl  steps.json  tensorboard/  trajectories/  checkpoints/step_N/  report.html  summary.json
logs/  wandb_id (with Weights & Biases)  model/ (resumed without the model that it began with)
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from pydantic import ConfigDict, TypeAdapter

from cluster.config.files import load_config, to_yaml
from cluster.config.run_config import RunConfig
from cluster.config.trust import named_code, remember
from cluster.errors import CosoError
from cluster.replacing import replace_text
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
        path = path.absolute()
        self.path = path
        self.model = path / "model"  # a copy of a checkpoint's model, if the run was resumed without its own
        self.trajectories = path / "trajectories"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / METRICS_FILE
        self.steps = path / "steps.json"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.logs = path / "logs"  # the actors' output, if the run failed
        #: Part of the names of this process's weight files: other users cannot guess it. Set by `lock`.
        self.weights_name = ""

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
            run.clear()
        try:
            run.path.mkdir(parents=True, exist_ok=overwrite)
            run.write_config(config)
        except OSError as error:
            raise CosoError(f"run folder {run.path} cannot be made: {error}") from None
        run.lock()
        remember(named_code(config.model_dump()))
        try:
            run.require_space()
        except CosoError:
            run.unlock()
            raise
        return run

    @classmethod
    def open_existing(cls, path: str | Path) -> RunFolder:
        """Open the run folder at `path`. Raises `CosoError` if it is not a run folder."""
        run = cls(Path(path))
        if not (run.path / "config.yaml").exists():
            raise CosoError(f"{path} is not a run folder: it has no config.yaml")
        return run

    def config(self, trusted: Sequence[str] = ()) -> RunConfig:
        """The run's config. trusted: code that it may name, see `cluster.config.trust`. Raises `CosoError` if it is
        invalid, for instance written by another version, or names other code that this user has not run before."""
        return load_config([self.path / "config.yaml"], trusted=trusted)

    def write_config(self, config: RunConfig) -> None:
        """Replace the run's config, at once: a crash leaves the old one or the new one. Raises `OSError`."""
        replace_text(self.path / "config.yaml", to_yaml(config))

    def lock(self) -> None:
        """Lock the folder for this process, and remove what a killed earlier owner left on this machine.

        Raises `CosoError` while another living process holds it.
        """
        path = self.path / "lock"
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
            pid, started = int(owner["pid"]), float(owner["started"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pid, started, owner = os.getpid(), 0.0, {}  # never locked, or not a valid lock file
        if pid > 0 and pid != os.getpid():
            if _is_running(pid, started):
                raise CosoError(f"{self.path} is in use by process {pid}; wait for it or stop it first")
            self._remove_leftovers(pid, str(owner.get("weights", f"{self.path.name}-{pid}")))
        mine = psutil.Process()
        self.weights_name = f"{self.path.name}-{mine.pid}-{secrets.token_hex(8)}"
        entry = {"pid": mine.pid, "started": mine.create_time(), "weights": self.weights_name}
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(entry, file)

    def with_model(self, config: RunConfig, update: int) -> RunConfig:
        """The config to resume with. Where the model that the run began with is gone, a whole checkpoint's takes its
        place, kept in the run folder because checkpoints are removed.

        update: of the checkpoint, 0 without one. Raises `CosoError` if the copy cannot be made.
        """
        path = config.model.path
        if Path(path).exists() or may_be_on_hub(path):
            return config
        if config.learner.lora is not None:
            # The checkpoint's model has the adapters merged, and they are trained on top of the first one.
            raise CosoError(
                f"model.path {path!r}, whose adapters this run trains, is gone; put it back, or name its new place in "
                f"{self.path / 'config.yaml'}"
            )
        saved = self.checkpoint_path(update) / "learner" / "model"
        if not self.model.exists():
            if not (saved / "config.json").exists():
                return config
            aside = self.model.with_suffix(".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                shutil.copytree(saved, aside, copy_function=_link_or_copy)
                aside.rename(self.model)
            except OSError as error:
                raise CosoError(f"{self.model} cannot be made of {saved}: {error}") from None
        return config.model_copy(update={"model": config.model.model_copy(update={"path": str(self.model)})})

    def _remove_leftovers(self, pid: int, weights_name: str) -> None:
        from cluster.launch.ray_runtime import short_temporary_folder, temporary_prefix
        from learner.publish import remove_weight_files

        remove_weight_files(weights_name, self.path)
        if pid != os.getpid() and _is_running(pid):
            return  # another process has the number now, and may be a run with folders of this name
        for folder in Path(short_temporary_folder()).glob(temporary_prefix(pid) + "*"):
            shutil.rmtree(folder, ignore_errors=True)

    def unlock(self) -> None:
        """Release the folder, and remove what an interrupted cleanup (a second Ctrl-C) left behind."""
        self._remove_leftovers(os.getpid(), self.weights_name)
        (self.path / "lock").unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what is in the folder. The folder itself stays, because it may be a link to another disk; of links in
        it, only the link goes. Raises `CosoError`."""
        try:
            # The config last: what is left by an interruption is a run folder still, which can be overwritten.
            for path in sorted(self.path.iterdir(), key=lambda path: path.name == "config.yaml"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except OSError as error:
            raise CosoError(f"run folder {self.path} cannot be replaced: {error}") from None

    def discard(self) -> None:
        """Remove a new run's folder, before anything was made in it."""
        self.clear()
        if not self.path.is_symlink():
            self.path.rmdir()

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
        replace_text(self.steps, json.dumps(steps))

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
        values = {"schema_version": CHECKPOINT_SCHEMA_VERSION, **asdict(progress)}
        replace_text(path / "progress.json", json.dumps(values, indent=1))
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


def may_be_on_hub(path: str) -> bool:
    """Whether a `model.path` that is not on this disk has the form of a hub model's name."""
    return path.count("/") == 1 and not path.startswith((".", "/", "models/"))


def _link_or_copy(source: str, destination: str) -> None:
    """A checkpoint's files never change, so a second name costs no space, where the file system has such."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def _is_running(pid: int, started: float | None = None) -> bool:
    """Whether the process started at `started` (None: any) is still running: not another one with the same pid, and no
    zombie, which is a process that has ended and whose parent has not asked for its exit status."""
    try:
        process = psutil.Process(pid)
        same = started is None or abs(process.create_time() - started) < 1.0
        return same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
