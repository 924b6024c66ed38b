"""`coso play`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.settings import RolloutSettings
from cluster.config.files import keyword_arguments
from cluster.errors import CosoError


def play(
    environment: Annotated[str, typer.Argument(metavar="ENV", help="For instance coso/NumberLine-v0.")],
    kwargs: Annotated[
        list[str] | None, typer.Argument(metavar="key=value...", help="Arguments of the environment.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the first episode.")] = 1,
    expert: Annotated[bool, typer.Option("--expert", help="Let the expert play instead of you.")] = False,
    noise: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the expert's random actions.")] = 0.0,
    episodes: Annotated[int, typer.Option(min=1, help="Number of episodes.")] = 1,
    frames: Annotated[Path | None, typer.Option(help="Folder to save every frame to, as PNG.")] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Stop an episode after this many steps.")] = 1000,
    model: Annotated[str | None, typer.Option(help="Let the model in this folder play instead of you.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="The model's sampling temperature; 0 is greedy.")] = 0.0,
    page: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Show the screen as a web page on this local port; 0: any free port."),
    ] = None,
) -> None:
    """Play an environment by hand, or watch its expert or a model, in the terminal or on a web page."""
    from cluster.play.page import opened_page
    from cluster.play.session import play as run_play

    arguments = keyword_arguments(kwargs or [])
    if model is not None and expert:
        raise CosoError("--model and --expert exclude each other; choose one")
    player = None
    if model is not None:
        from cluster.play.model_player import ModelPlayer

        player = ModelPlayer(model, temperature, seed, RolloutSettings().max_new_tokens)
    with opened_page(page, by_hand=not expert and player is None) as shown:
        run_play(environment, arguments, seed, expert, noise, episodes, frames, max_steps, player=player, page=shown)
