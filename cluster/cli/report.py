"""`coso report`."""

from __future__ import annotations

import typer

from cluster.cli.arguments import RunPath


def report(run: RunPath) -> None:
    """Write RUN/report.html: curves, sample episodes, and utterances shaded by influence."""
    from cluster.report.page import write_report
    from cluster.run.run_folder import RunFolder

    typer.echo(str(write_report(RunFolder.open_existing(run).path)))
