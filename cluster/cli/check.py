"""`coso check`: whether a model, or an environment, works with this project, and if not, why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.config.files import config_of_words, keyword_arguments
from cluster.errors import CosoError

#: `coso/NumberLine-v0`, `module:Name-v0`: an environment, where no folder has that name. A hub name has no colon, and
#: another organisation before its slash.
ENVIRONMENT_ID = re.compile(r"(coso/|[\w.]+:([\w-]+/)?)[\w-]+(-v\d+)?")
#: A check's name, whether it works (None: was not tried), what was found.
Row = tuple[str, bool | None, str]
STATES = {True: "works", False: "[bold red]does not work[/]", None: "not tried"}


def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|ENV", help="A model folder or hub name; or an environment, as coso/NumberLine-v0."
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE.yaml... key.sub=value...",
            help="For a model: the config that it is to run with. For an environment: its arguments, key=value.",
        ),
    ] = None,
) -> None:
    """Say what works: of a model, every part that a run depends on; of an environment, its contract.

    Exit code 1 if something does not work. A model is served by an engine and run by the learner for this, which takes
    a minute.
    """
    environment = ENVIRONMENT_ID.fullmatch(target) is not None and not Path(target).exists()
    rows = _environment_rows(target, words or []) if environment else _model_rows(target, words or [])
    Console().print(results_table(target, rows))
    if broken := sum(works is False for _, works, _ in rows):
        raise CosoError(f"{broken} of {len(rows)} checks of {target} do not work; see the table")


def _model_rows(path: str, words: list[str]) -> list[Row]:
    from cluster.model_check import check_model
    from cluster.telemetry.progress import spinner

    config = config_of_words([*words, f"model.path={json.dumps(path)}"])
    with spinner(f"checking {path}"):
        return [(finding.what, finding.works, finding.says) for finding in check_model(config)]


def _environment_rows(env_id: str, words: list[str]) -> list[Row]:
    from cluster.telemetry.progress import spinner
    from envs.contract import check_environment

    with spinner(f"checking {env_id}"):
        results = check_environment(env_id, keyword_arguments(words))
    return [(result.name, result.ok, result.summary) for result in results]


def results_table(title: str, rows: list[Row]) -> Table:
    """One line per check."""
    table = Table(title=title)
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for what, works, says in rows:
        table.add_row(what, STATES[works], escape(says))
    return table
