"""`coso demos`: record an expert's demonstrations as Arrow shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.config.files import keyword_arguments


def demos(
    environment: Annotated[str, typer.Argument(metavar="ENV", help="For instance coso/EZPoints-v0.")],
    steps: Annotated[int, typer.Argument(metavar="N", min=1, help="Number of steps.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    kwargs: Annotated[
        list[str] | None, typer.Argument(metavar="key=value...", help="Arguments of the environment.")
    ] = None,
    noise: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of steps with another action than the expert's; leaves room for RL."
        ),
    ] = 0.0,
    habit: Annotated[str, typer.Option(help="The action in those steps; default: uniformly random.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of episodes and noise.")] = 1,
) -> None:
    """Let an environment's expert play N steps and write them to OUT as Arrow shards, for `coso warmstart`.

    Train on them with `coso warmstart CONFIG warm_start.demonstrations_from=OUT`.
    """
    from cluster.demonstrations.collect import Play, write_demonstrations

    play = Play(environment, keyword_arguments(kwargs or []), seed, noise, habit)
    mean = write_demonstrations(play, steps, out)
    typer.echo(f"{steps} steps in {out}, mean reward {mean:.3f} per step")
