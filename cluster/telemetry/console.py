"""The live console of a run: its progress, its current stage, and its main metrics on one screen.

Without a terminal (a pipe, a CI log) it prints plain lines: the starting stages, messages, and one line per update.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import IO, Any

from rich.columns import Columns
from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cluster.telemetry.catalogue import describe, show

#: Group -> metrics shown in it.
NUMBERS: dict[str, tuple[str, ...]] = {
    "policy": (
        "evaluation/success",
        "rollout/success",
        "rollout/return",
        "rollout/valid_rate",
        "rollout/episode_length",
        "rollout/environment_failures",
    ),
    "exploration": (
        "learner/entropy",
        "learner/weighted_entropy",
        "influence/nonzero",
        "influence/top_decile",
        "scm/accuracy",
        "scm/ece",
    ),
    "update": (
        "learner/approx_kl",
        "learner/clip_fraction",
        "learner/gradient_norm",
        "learner/explained_variance",
        "learner/mismatch_mean",
        "learner/mismatch_max",
    ),
    "machine": (
        "speed/tokens_per_s",
        "speed/env_steps_per_s",
        "lag/mean",
        "queue/bytes",
        "memory/driver_mb",
        "recoveries",
    ),
}
#: Metric -> range of its curve; None: the range of its values.
CURVES: dict[str, tuple[float, float] | None] = {
    "evaluation/success": (0.0, 1.0),
    "rollout/success": (0.0, 1.0),
    "rollout/return": None,
    "learner/entropy": None,
    "learner/approx_kl": None,
}
#: Metrics in the plain line of an update.
PLAIN = (
    "evaluation/success",
    "rollout/success",
    "rollout/return",
    "rollout/valid_rate",
    "learner/entropy",
    "learner/approx_kl",
    "lag/mean",
    "speed/tokens_per_s",
    "speed/env_steps_per_s",
    "time/total",
)
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 60
#: Number of latest updates in the curves.
CURVE_UPDATES = 2000


class Console:
    """A context manager. Its methods may be called from any thread.

    title: describes the run. total_updates: 0 for an evaluation. enabled: False prints plain lines even on a terminal.
    file: the output, standard output by default.
    """

    def __init__(self, title: str, total_updates: int, enabled: bool, file: IO[str] | None = None) -> None:
        self._terminal = Terminal(file=file or sys.stdout, highlight=False)
        self._title = title
        self._total = total_updates
        self._latest: dict[str, float] = {}
        self._before: float | None = None
        self._curves: dict[str, deque[float]] = {key: deque(maxlen=CURVE_UPDATES) for key in CURVES}
        self._marks: list[tuple[int, float]] = []
        self._stage = ""
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        if enabled and self._terminal.is_terminal:
            self._live = Live(get_renderable=self.render, console=self._terminal, refresh_per_second=4)

    def __enter__(self) -> Console:
        if self._live is not None:
            self._live.start()
        else:
            self._print(self._title)
        return self

    def __exit__(self, *_: object) -> None:
        self._stage = ""
        if self._live is not None:
            self._live.stop()

    def stage(self, text: str) -> None:
        """Set the current stage of the run."""
        self._stage = text
        if self._live is None and not self._marks:  # after the first update, the lines of the updates suffice
            self._print(text)

    def message(self, text: str) -> None:
        """Print a message for the user; it stays above the live part."""
        self._print(text)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show the row of an update, as in `metrics.jsonl`; any metric may be missing or null."""
        row = {key: float(value) for key, value in metrics.items() if isinstance(value, Real) and math.isfinite(value)}
        update = int(row.get("update", 0))
        # Not every update has an evaluation, so the last one stays on the screen. In async mode an evaluation has a row
        # of its own, after that of its update.
        same = bool(self._marks) and update == self._marks[-1][0]
        kept = {key: value for key, value in self._latest.items() if same or key.startswith("evaluation/")}
        self._latest = {**kept, **row}
        if self._before is None:
            self._before = row.get("evaluation/success")
        for key, curve in self._curves.items():
            if key in row:
                curve.append(row[key])
        if not same:
            self._marks = [*self._marks[:1], (update, time.monotonic())]
        if self._live is None:
            numbers = "  ".join(f"{_short_label(key)} {show(key, row[key])}" for key in PLAIN if key in row)
            self._print(f"update {update}/{self._total}  {numbers}")

    def render(self) -> RenderableType:
        """The current screen."""
        parts: list[RenderableType] = []
        if self._total:
            parts.append(self._progress())
        if self._stage:
            self._spinner.update(text=Text(self._stage, style="cyan"))
            parts.append(self._spinner)
        if self._latest:
            parts += [Text(), Columns([self._table(name) for name in NUMBERS], equal=True, expand=True)]
            if any(len(curve) > 1 for curve in self._curves.values()):
                parts += [Text(), self._curve_table()]
        return Panel(Group(*parts), title=f"[bold]{escape(self._title)}[/bold]", border_style="dim", padding=(0, 1))

    def _progress(self) -> Table:
        update = int(self._latest.get("update", 0))
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column()
        line.add_column(ratio=1)
        line.add_column()
        remaining = seconds_left(self._marks, self._total)
        line.add_row(
            Text(f"update {update} of {self._total}", style="bold"),
            ProgressBar(total=self._total, completed=update),
            Text("" if remaining is None else f"{duration(remaining)} left", style="dim"),
        )
        return line

    def _table(self, group: str) -> Table:
        table = Table(box=None, show_header=True, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column(group)
        table.add_column(justify="right")
        for key in NUMBERS[group]:
            value = show(key, self._latest.get(key))
            if key == "evaluation/success" and self._before is not None:
                value = f"{self._before:.3f} → {value}"
            table.add_row(Text(_short_label(key), style="dim"), value)
        return table

    def _curve_table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for key, span in CURVES.items():
            values = self._curves[key]
            if len(values) > 1:
                low, high = span or (min(values), max(values))
                table.add_row(
                    Text(_short_label(key), style="dim"),
                    Text(show(key, low), style="dim"),
                    Text(sparkline(values, CURVE_WIDTH, span), style="green"),
                    Text(show(key, high), style="dim"),
                )
        return table

    def _print(self, text: str) -> None:
        self._terminal.print(Text(text), soft_wrap=True)


def sparkline(values: Sequence[float] | deque[float], width: int, span: tuple[float, float] | None = None) -> str:
    """Values as at most `width` block characters; if there are more values, a character shows the mean of several.

    span: values of the lowest and the highest block; default: the range of the values.
    """
    numbers = list(values)
    if not numbers:
        return ""
    count = min(width, len(numbers))
    edges = [len(numbers) * i // count for i in range(count + 1)]
    means = [sum(numbers[a:b]) / (b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    low, high = span or (min(means), max(means))
    if high <= low:
        return BLOCKS[0] * count
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round(top * min(max((mean - low) / (high - low), 0.0), 1.0))] for mean in means)


def seconds_left(marks: Sequence[tuple[int, float]], total: int) -> float | None:
    """Estimated time to the last update, seconds; None before there are two marks.

    marks: the first and the latest (update, time in seconds) seen; a resumed run begins at the update it resumed.
    """
    if len(marks) < 2 or marks[-1][0] <= marks[0][0]:
        return None
    (first, began), (latest, now) = marks[0], marks[-1]
    return (now - began) / (latest - first) * (total - latest)


def duration(seconds: float) -> str:
    """Seconds as `1 h 02 min`, `3 min 20 s` or `45 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def _short_label(key: str) -> str:
    """The catalogue's label; `held-out` marks evaluation metrics, which share labels with rollouts."""
    label = describe(key).label
    return f"held-out {label}" if key.startswith("evaluation/") else label
