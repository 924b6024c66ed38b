"""The report's figures: small SVGs that take their text colour from the page, for light and dark themes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import ColorType

from scoring.calibration import ReliabilityCurve, read_curve

Rows = Sequence[dict[str, Any]]

#: Stands for the page's text colour until the SVG is written; CSS decides.
_INK = "#010203"
#: Colours that are visible on white and on near-black.
_SERIES: tuple[ColorType, ...] = ("#e07b00", "#3b82c4", "#3a9d5d", "#b0559e", "#8a8f98", "#c94f4f", "#7a6ff0")
#: Lower end of logarithmic axes; an exact 0 is drawn here.
SMALLEST_SHOWN = 1e-9
#: Stages in the time figure, in the order of the loop.
STAGES = ("collect", "score", "update", "publish", "sync_check", "evaluate")


@dataclass(frozen=True, slots=True)
class Panel:
    """One small figure. series: metric key -> its name in the legend."""

    title: str
    series: dict[str, str]
    share: bool = False  # an axis from 0 to 1
    logarithmic: bool = False


PANELS = (
    Panel("Success", {"evaluation/success": "held-out", "rollout/success": "rollouts"}, share=True),
    Panel("Return", {"evaluation/return": "held-out", "rollout/return": "rollouts"}),
    Panel("Valid answers", {"evaluation/valid_rate": "held-out", "rollout/valid_rate": "rollouts"}, share=True),
    Panel(
        "Entropy per token (nats)",
        {"learner/entropy": "uniform", "learner/weighted_entropy": "weighted by influence"},
    ),
    Panel(
        "Influence",
        {"influence/top_decile": "share on the top tenth", "influence/nonzero": "tokens above 0"},
        share=True,
    ),
    Panel(
        "Causal model, new answers",
        {"scm/accuracy": "accuracy", "scm/confidence": "confidence", "scm/ece": "calibration error"},
        share=True,
    ),
    Panel(
        "Agreement of influence with the parser",
        {
            "fidelity/spearman": "rank correlation",
            "fidelity/top_overlap": "parser's tokens on top",
            "fidelity/action_mass": "influence on the action part",
        },
        share=True,
    ),
    Panel("KL to the sampling policy (nats)", {"learner/approx_kl": "KL"}),
    Panel("Clipped steps", {"learner/clip_fraction": "share"}, share=True),
    Panel("Value", {"learner/explained_variance": "explained variance"}),
    Panel("Gradient norm", {"learner/gradient_norm": "mean", "learner/gradient_norm_max": "largest"}),
    Panel(
        "Engine against learner, |Δ log p| (nats)",
        {"learner/mismatch_max": "largest", "learner/mismatch_mean": "mean", "sync_check/max_difference": "sync check"},
        logarithmic=True,
    ),
    Panel("Policy lag (versions)", {"lag/mean": "mean", "lag/max": "largest"}),
    Panel("Tokens per second", {"speed/tokens_per_s": "generated"}),
    Panel("Environment steps per second", {"speed/env_steps_per_s": "steps"}),
    Panel("Memory (MiB)", {"memory/driver_mb": "driver"}),
)


#: Prefix of a reliability curve's keys -> title, and names of its axes.
RELIABILITY = {
    "policy/": ("Policy: is a frequent action a good one?", "share of other answers", "success"),
    "learner/": ("Critic: is the return what it expects?", "value", "return"),
    "scm/": ("Causal model: is it as often right as it says?", "confidence", "right predictions"),
}


def wilson_interval(successes: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval (low, high) of successes / trials, 95% by default; (0, 1) without trials."""
    if trials <= 0:
        return 0.0, 1.0
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def curve_figures(rows: Rows) -> list[str]:
    """One SVG per panel that has data."""
    figures = []
    for panel in PANELS:
        series = {key: points(rows, key) for key in panel.series}
        if any(series.values()):
            figures.append(_curve(panel, {key: found for key, found in series.items() if found}, rows))
    return figures


def points(rows: Rows, key: str) -> list[tuple[float, float]]:
    """(update, value) of the rows that hold a finite number under `key`."""
    return [(float(row.get("update", 0)), float(row[key])) for row in rows if is_number(row.get(key))]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def time_figure(rows: Rows) -> str | None:
    """Stacked bars of each update's seconds by stage, or None if no stage was timed."""
    stages = {stage: dict(points(rows, f"time/{stage}")) for stage in STAGES}
    updates = sorted({update for found in stages.values() for update in found})
    if not updates:
        return None
    figure, axes = _axes("Seconds by stage", (9.6, 2.7))
    below = [0.0] * len(updates)
    for color, (stage, found) in zip(_SERIES, stages.items(), strict=False):
        if found:
            heights = [found.get(update, 0.0) for update in updates]
            axes.bar(updates, heights, bottom=below, width=0.8, color=color, label=stage.replace("_", " "))
            below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8, ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _svg(figure, "time")


def profile_figure(profiles: Mapping[int, np.ndarray]) -> str:
    """Mean influence by position in the answer, one line per update. profiles: update -> (bins,) in [0, 1]."""
    figure, axes = _axes("Mean influence along the answer", (9.6, 2.4))
    for color, (update, profile) in zip(_SERIES, profiles.items(), strict=False):
        edges = np.linspace(0.0, 1.0, len(profile) + 1)
        axes.stairs(profile, edges, color=color, label=f"update {update}", linewidth=1.6)
    axes.set_xlabel("first token to last", fontsize=8, color=_INK)
    axes.set_xlim(0.0, 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(bottom=0.0)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8, loc="best")
    return _svg(figure, "influence profile")


def reliability_figures(rows: Rows) -> list[str]:
    """One SVG per kind of prediction that was measured: the curves of its first and last update, by the diagonal."""
    figures = []
    for prefix, (title, predicted, observed) in RELIABILITY.items():
        found = {row.get("update", 0): curve for row in rows if (curve := read_curve(row, prefix)) is not None}
        if found:
            ends = {update: found[update] for update in (min(found), max(found))}
            figures.append(_reliability(title, predicted, observed, ends, share=prefix != "learner/"))
    return figures


def time_totals(rows: Rows) -> list[tuple[str, float, str]]:
    """(stage, seconds over all updates, colour) of every stage that was timed."""
    totals = [
        (stage.replace("_", " "), sum(value for _, value in points(rows, f"time/{stage}")), str(color))
        for stage, color in zip(STAGES, _SERIES, strict=False)
    ]
    return [total for total in totals if total[1] > 0]


def _reliability(title: str, predicted: str, observed: str, curves: Mapping[int, ReliabilityCurve], share: bool) -> str:
    figure, axes = _axes(title, (3.7, 2.9))
    every = [0.0, 1.0] if share else np.concatenate([[*curve.predicted, *curve.observed] for curve in curves.values()])
    ends = [np.min(every), np.max(every)]
    axes.plot(ends, ends, color=_INK, alpha=0.4, linewidth=1.0, linestyle="--")
    for color, (update, curve) in zip(_SERIES, curves.items(), strict=False):
        label = f"update {update}: error {curve.error:.3g}"
        axes.plot(curve.predicted, curve.observed, color=color, label=label, linewidth=1.6, marker="o", markersize=4)
    axes.set_xlabel(predicted, fontsize=8, color=_INK)
    axes.set_ylabel(observed, fontsize=8, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8, loc="best")
    return _svg(figure, title)


def _curve(panel: Panel, series: dict[str, list[tuple[float, float]]], rows: Rows) -> str:
    figure, axes = _axes(panel.title, (3.7, 2.3))
    for color, (key, found) in zip(_SERIES, series.items(), strict=False):
        updates, values = zip(*found, strict=True)
        if panel.logarithmic:
            values = tuple(max(value, SMALLEST_SHOWN) for value in values)
        dotted = key.startswith("evaluation/") or len(found) == 1
        marker = "o" if dotted else ""
        axes.plot(updates, values, color=color, label=panel.series[key], linewidth=1.6, marker=marker, markersize=4)
        if key == "evaluation/success":
            _draw_interval(axes, rows, color)
    if panel.share:
        axes.set_ylim(-0.03, 1.03)
    if panel.logarithmic:
        axes.set_yscale("log")
    if len(panel.series) > 1:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=8, loc="best")
    return _svg(figure, panel.title)


def _draw_interval(axes: Axes, rows: Rows, color: ColorType) -> None:
    """Draw the 95% interval of held-out success where the number of episodes is known."""
    keys = ("evaluation/success", "evaluation/episodes")
    known = [row for row in rows if all(is_number(row.get(key)) for key in keys)]
    bounds = [wilson_interval(row[keys[0]] * row[keys[1]], row[keys[1]]) for row in known]
    if bounds:
        low, high = zip(*bounds, strict=True)
        axes.fill_between([row.get("update", 0) for row in known], low, high, color=color, alpha=0.18, linewidth=0)


def _axes(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    axes.grid(color=_INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("update", fontsize=8, color=_INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element; the name makes its element ids unique on the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # ids of groups, such as axes_1; clip paths and markers have hashed ids
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", svg)
    return svg.replace(_INK, "currentColor")
