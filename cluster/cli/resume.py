"""`coso resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.arguments import RunPath, print_summary


def resume(
    run: RunPath,
    updates: Annotated[
        int | None, typer.Option(min=1, help="Train up to this many updates in all, if more than configured.")
    ] = None,
) -> None:
    """Continue a run that was interrupted, from its last checkpoint and its log of accepted trajectories."""
    from cluster.training import resume as run_resumed

    print_summary(run_resumed(run, updates))
