"""`report.html` of a run: one self-contained file.

It shows success before and after training (with 95% intervals), curves, sample episodes with each token shaded by its
influence on the action, time by stage, and the config. A report of an unfinished run leaves out what is missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup

from cluster.replacing import replace_text
from cluster.report.figures import (
    Rows,
    curve_figures,
    is_number,
    profile_figure,
    reliability_figures,
    time_figure,
    time_totals,
    wilson_interval,
)
from cluster.report.samples import influence_profiles, sample_episodes
from cluster.telemetry.console import duration
from cluster.telemetry.metrics import read_metrics

if TYPE_CHECKING:
    from actors.chat import ChatProcessor

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, slots=True)
class Measured:
    """A share of episodes with its 95% interval, all in [0, 1]."""

    share: float
    low: float
    high: float
    episodes: int


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run's folder and return its path."""
    config_text = (run_folder / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(config_text) or {}
    rows = read_metrics(run_folder / "metrics.jsonl")
    summary = _read_summary(run_folder / "summary.json")
    chat = _tokenizer(run_folder, config)
    profiles = influence_profiles(run_folder / "trajectories")
    episodes, unread = sample_episodes(run_folder / "trajectories", chat)
    page = _template().render(
        name=config.get("name", run_folder.name),
        finished=bool(summary),
        before=evaluation(rows, first=True),
        after=evaluation(rows, first=False),
        facts=_facts(config, rows, summary),
        curves=[Markup(svg) for svg in curve_figures(rows)],
        reliability=[Markup(svg) for svg in reliability_figures(rows)],
        time_curve=Markup(time_figure(rows) or ""),
        time_totals=time_totals(rows),
        overlapping=config.get("mode") == "async",
        episodes=episodes,
        unread=unread,
        shaded=chat is not None and _get(config, "entropy", "mode") == "counterfactual",
        influence_profile=Markup(profile_figure(profiles)) if profiles else "",
        config=config_text,
    )
    path = run_folder / "report.html"
    replace_text(path, page, errors="replace")
    return path


def evaluation(rows: Rows, first: bool) -> Measured | None:
    """The evaluation before the first update, or the latest one after an update; None if there is none."""
    made = [row for row in rows if is_number(row.get("evaluation/success"))]
    chosen = [row for row in made if (row.get("update", 0) == 0) == first]
    if not chosen:
        return None
    row = chosen[0] if first else chosen[-1]
    share, episodes = float(row["evaluation/success"]), row.get("evaluation/episodes")
    count = int(episodes) if is_number(episodes) else 0
    return Measured(share, *wilson_interval(share * count, count), count)


def latest_model(run_folder: Path, config: dict[str, Any]) -> str | None:
    """The model folder with the run's tokenizer: of the latest checkpoint, else the model the run started from."""
    checkpoints = [
        path for path in (run_folder / "checkpoints").glob("step_*/learner/model") if path.parents[1].name[5:].isdigit()
    ]
    if checkpoints:
        return str(max(checkpoints, key=lambda path: int(path.parents[1].name[5:])))
    return _get(config, "model", "path")


def _tokenizer(run_folder: Path, config: dict[str, Any]) -> ChatProcessor | None:
    from actors.chat import ChatProcessor, NotAVisionLanguageModel

    path = latest_model(run_folder, config)
    try:
        return ChatProcessor(path) if path else None
    except NotAVisionLanguageModel:  # moved or removed since: make the report without it
        return None


def _facts(config: dict[str, Any], rows: Rows, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) pairs that describe the run; unknown values are left out."""
    last = rows[-1] if rows else {}
    updates = summary.get("updates", last.get("update", 0))
    planned = _get(config, "training", "updates")
    steps = summary.get("env_steps", last.get("environment_steps"))
    wall = summary.get("wall_seconds")
    recoveries = summary.get("recoveries_by_kind") or {}
    total = summary.get("recoveries", last.get("recoveries"))
    by_kind = ", ".join(f"{kind} {number}" for kind, number in recoveries.items())
    facts = [
        ("environment", _get(config, "environment", "id")),
        ("model", _get(config, "model", "path")),
        ("mode", config.get("mode")),
        ("entropy", _get(config, "entropy", "mode")),
        ("seed", config.get("seed")),
        ("updates", f"{updates} of {planned}" if planned is not None else updates),
        ("environment steps", f"{steps:,.0f}" if is_number(steps) else None),
        ("wall time", duration(wall) if is_number(wall) else None),
        ("recoveries", f"{total:.0f}" + (f" ({by_kind})" if by_kind else "") if is_number(total) else None),
    ]
    return [(label, str(value)) for label, value in facts if value is not None]


def _read_summary(path: Path) -> dict[str, Any]:
    """The summary, or {} if the run has not finished."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _get(values: dict[str, Any], section: str, key: str) -> Any:
    inner = values.get(section)
    return inner.get(key) if isinstance(inner, dict) else None


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE)
