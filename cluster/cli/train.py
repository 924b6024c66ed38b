"""`coso train`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.arguments import DryRun, Overwrite, Trust, Words, print_plan, print_summary
from cluster.config.files import config_of_words, validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.telemetry.wandb_run import require_wandb


def train(
    words: Words,
    seed: Annotated[
        str | None, typer.Option(help="Seed, or several as 1,2,3: one run each, named NAME-seed1, NAME-seed2, ...")
    ] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    trust: Trust = None,
) -> None:
    """Train a vision-language agent online; prints its success before and after, and the path of the report."""
    config = config_of_words(words, trust)
    configs = _per_seed(config, seed)
    if dry_run:
        for each in configs:
            require_wandb(each)
            print_plan(each)
        return
    from cluster.training import train as run_training

    for each in configs:
        print_summary(run_training(each, overwrite=overwrite))


def _per_seed(config: RunConfig, seed: str | None) -> list[RunConfig]:
    if seed is None:
        return [config]
    try:
        seeds = [int(part) for part in seed.split(",")]
    except ValueError:
        raise CosoError(f"--seed {seed!r} is not a number or a list of numbers like 1,2,3") from None
    if len(set(seeds)) < len(seeds):
        raise CosoError(f"--seed {seed!r} names a seed twice; each seed is one run")
    values = config.model_dump()
    if len(seeds) == 1:
        return [validate({**values, "seed": seeds[0]})]
    return [validate({**values, "seed": each, "name": f"{config.name}-seed{each}"}) for each in seeds]
