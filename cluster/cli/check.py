"""`coso check`: whether a model, or an environment, works with this project, and if not, why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.config.files import config_of_words, keyword_arguments
from cluster.errors import CosoError

if TYPE_CHECKING:
    from cluster.model_check import Finding

#: `coso/NumberLine-v0`, `module:Name-v0`: an environment, where no folder has that name.
ENVIRONMENT_ID = re.compile(r"^([\w.]+:)?([\w-]+/)?[\w-]+-v\d+$")
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
    if ENVIRONMENT_ID.match(target) and not Path(target).exists():
        from envs.contract import check as check_environment  # the seam with the environments' contract suite

        if not check_environment(target, keyword_arguments(words or [])):
            raise CosoError(f"{target} does not keep the contract of environments; see above")
        return
    from cluster.model_check import check_model
    from cluster.telemetry.progress import spinner

    config = config_of_words([*(words or []), f"model.path={json.dumps(target)}"])
    with spinner(f"checking {target}"):
        findings = list(check_model(config))
    Console().print(findings_table(target, findings))
    if broken := [finding for finding in findings if finding.works is False]:
        raise CosoError(f"{len(broken)} of {len(findings)} checks of {target} do not work; see the table")


def findings_table(title: str, findings: list[Finding]) -> Table:
    """One row per finding."""
    table = Table(title=title)
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for finding in findings:
        table.add_row(finding.what, STATES[finding.works], finding.says.replace("[", r"\["))
    return table
