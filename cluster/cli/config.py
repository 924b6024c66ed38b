"""`coso config`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.arguments import Trust
from cluster.config.files import config_of_words, to_yaml
from cluster.config.run_config import RunConfig


def show_config(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="FILE.yaml... key.sub=value...", help="As for `coso train`.")
    ] = None,
    docs: Annotated[bool, typer.Option("--docs", help="Print the reference of every key as Markdown.")] = False,
    trust: Trust = None,
) -> None:
    """Print the resolved config: every key with its value."""
    if docs:
        from cluster.config.reference import config_markdown

        typer.echo(config_markdown(RunConfig), nl=False)
    else:
        typer.echo(to_yaml(config_of_words(words or [], trust)), nl=False)
