"""Write a run's metrics to `metrics.jsonl`, TensorBoard, and W&B if configured.

One object per update; in async mode, an evaluation's figures follow in one more object of the update it measured.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.config.run_config import RunConfig
from cluster.replacing import replace_text
from cluster.telemetry.wandb_run import start_wandb
from scoring.calibration import POINT

logger = logging.getLogger(__name__)

#: Prefixes of metrics that depend on the machine: in sync mode, two runs with the same seed differ only in these.
#: `cache/` is one of them, because a resumed run starts with an empty cache.
TIMING_PREFIXES = ("time/", "speed/", "memory/", "queue/", "bytes/", "mean_seconds/", "busy/", "cache/")


METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends rows to a run's folder.

    resume_from: the update to continue from; rows of later updates are removed, since the run writes them again. 0, for
    a run without a checkpoint, removes all rows. None: a new run.
    """

    def __init__(self, folder: Path, config: RunConfig, resume_from: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS_FILE
        if resume_from is not None:
            kept = [row for row in read_metrics(self._path) if resume_from and row["update"] <= resume_from]
            replace_text(self._path, "".join(_line(row) for row in kept))
        purge = None if resume_from is None else resume_from and resume_from + 1
        self._tensorboard = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=purge)
        self._wandb = start_wandb(folder, config) if config.logging.wandb_project else None

    def write(self, row: dict[str, Any]) -> None:
        """Append a row of `update` and metrics (name -> number); values that are not finite become null.

        Points of reliability curves stay out of TensorBoard and W&B, which would draw each of them over the updates.
        """
        clean = {key: _finite(value) for key, value in row.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(clean))
        drawn = {key: value for key, value in clean.items() if POINT not in key}
        for key, value in drawn.items():
            if isinstance(value, (int, float)) and key != "update":
                self._tensorboard.add_scalar(key, value, row["update"])
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(drawn, step=row["update"])

    def close(self) -> None:
        """Close TensorBoard and W&B."""
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; [] without a file. Lines that are no rows (a crash may cut one off, a full disk
    damage one) are left out and counted in a warning.

    One row per update: an evaluation beside training has a line of its own, which joins that of its update.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    left_out = []
    # Bytes, since a text's splitlines also splits at characters that JSON allows in a string.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            left_out.append(number)
        elif rows and rows[-1]["update"] == row["update"]:
            rows[-1] |= row
        else:
            rows.append(row)
    if left_out:
        logger.warning(
            "%s: %d lines are no metrics and are left out, the first is line %d", path, len(left_out), left_out[0]
        )
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's row; None where it is no JSON object with an update number."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # deep nesting is a RecursionError
        return None
    update = row.get("update") if isinstance(row, dict) else None
    return row if isinstance(update, int) and not isinstance(update, bool) else None


def without_timings(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without machine-dependent metrics: what two sync runs with the same seed must agree on."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMING_PREFIXES)} for row in rows]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True) + "\n"


def _finite(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
