"""`coso warmstart`."""

from __future__ import annotations

import typer

from cluster.cli.arguments import DryRun, Overwrite, Trust, Words, print_plan
from cluster.config.files import config_of_words


def warmstart(words: Words, dry_run: DryRun = False, overwrite: Overwrite = False, trust: Trust = None) -> None:
    """Make a small VLM (or take `model.path`) and teach it the answer format from an expert's demonstrations."""
    config = config_of_words(words, trust)
    if dry_run:
        print_plan(config)
        return
    from cluster.demonstrations.warm_start import warm_start

    path = warm_start(config, overwrite=overwrite)
    typer.echo(f"warm-started model: {path}")
