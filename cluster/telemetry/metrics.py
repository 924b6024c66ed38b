"""Where a run's numbers go: `metrics.jsonl` (one object per update), TensorBoard, and W&B if configured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.config.run_config import RunConfig

#: Metrics under these prefixes are measurements of the machine, not of the run: two runs of the same seed differ in
#: them and in nothing else. What scores are still remembered is of that kind: a resumed run begins with none.
TIMING_PREFIXES = ("time/", "speed/", "memory/", "queue/", "bytes/", "mean_seconds/", "busy/", "cache/")


METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends one row per update to a run's folder.

    `resume_from`: rows of later updates are dropped, to be made again; 0, for a run without a checkpoint, drops all,
    since such a run measures its start again too.
    """

    def __init__(self, folder: Path, config: RunConfig, resume_from: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS_FILE
        if resume_from is not None:
            kept = [row for row in read_metrics(self._path) if resume_from and row["update"] <= resume_from]
            aside = self._path.with_suffix(".tmp")
            aside.write_text("".join(_line(row) for row in kept), encoding="utf-8")
            aside.rename(self._path)
        purge = None if resume_from is None else resume_from and resume_from + 1
        self._tensorboard = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=purge)
        self._wandb = _start_wandb(folder, config) if config.logging.wandb_project else None

    def write(self, row: dict[str, Any]) -> None:
        """row: `update` and metric names to numbers; what is not finite is written as null."""
        clean = {key: _finite(value) for key, value in row.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(clean))
        for key, value in clean.items():
            if isinstance(value, (int, float)) and key != "update":
                self._tensorboard.add_scalar(key, value, row["update"])
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(clean, step=row["update"])

    def close(self) -> None:
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def without_timings(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as two runs of one seed must agree on them."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMING_PREFIXES)} for row in rows]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True) + "\n"


def _finite(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(folder: Path, config: RunConfig) -> Any:
    from cluster.errors import CosoError

    try:
        import wandb
    except ImportError:
        raise CosoError("logging.wandb_project needs wandb, which is not installed: pip install wandb") from None
    return wandb.init(
        project=config.logging.wandb_project,
        name=config.name,
        dir=str(folder),
        resume="allow",
        config=config.model_dump(mode="json"),
    )
