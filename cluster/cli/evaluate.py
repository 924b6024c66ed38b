"""`coso eval`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cluster.cli.arguments import Trust, Words
from cluster.config.files import config_of_words


def evaluate(
    words: Words,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name; default: model.path of the config.")
    ] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Held-out episodes; default: as configured.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; default: as configured.")] = None,
    trust: Trust = None,
) -> None:
    """Measure a model's success on held-out episodes. Prints JSON."""
    changes = {
        key: value
        for key, value in {
            "model.path": model,
            "training.evaluation_episodes": episodes,
            "training.evaluation_temperature": temperature,
        }.items()
        if value is not None
    }
    config = config_of_words([*words, *(f"{key}={json.dumps(value)}" for key, value in changes.items())], trust)
    from cluster.training import evaluate as run_evaluation

    typer.echo(json.dumps(run_evaluation(config), indent=1))
