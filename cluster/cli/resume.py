"""`coso resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.arguments import RunPath, Trust, print_summary


def resume(
    run: RunPath,
    updates: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Extend the run to so many updates in all; its config.yaml keeps the number. Beyond the old end the "
            "learning rate stays where its schedule ended (learner.schedule_updates).",
        ),
    ] = None,
    trust: Trust = None,
) -> None:
    """Continue an interrupted run from its last checkpoint and its trajectory log."""
    from cluster.training import resume as run_resumed

    print_summary(run_resumed(run, updates, trust or ()))
