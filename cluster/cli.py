"""The `coso` command. Heavy imports happen inside the commands, so that `--help` and errors answer at once."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster import alfworld_command
from cluster.config import RunConfig
from cluster.config_files import config_of_words, keyword_arguments, to_yaml, validate
from cluster.demos_command import demos
from cluster.errors import CosoError
from cluster.fleet.command import fleet_app
from cluster.influence_command import influence
from cluster.serve_command import serve

#: Exit code of what was ended by Ctrl-C or SIGTERM, as shells have it.
INTERRUPTED = 130

app = typer.Typer(
    name="coso",
    help="Online reinforcement learning of vision-language agents with Counterfactual Soft RL (CoSo).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(alfworld_command.app)

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE.yaml... key.sub=value...",
        help="Config files, each laid over the ones before, and overrides, which win.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved config and the resources it takes; start nothing.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what a former run of this name left.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for instance runs/numberline.")]


@app.command()
def train(
    words: Words,
    seed: Annotated[
        str | None, typer.Option(help="Seed, or several as 1,2,3: one run each, named NAME-seed1, NAME-seed2, ...")
    ] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a vision-language agent online, and end with its success before and after and a report to open."""
    config = config_of_words(words)
    configs = _per_seed(config, seed)
    if dry_run:
        for each in configs:
            _print_plan(each)
        return
    from cluster.training import train as run_training

    for each in configs:
        _print_summary(run_training(each, overwrite=overwrite))


@app.command()
def warmstart(words: Words, dry_run: DryRun = False, overwrite: Overwrite = False) -> None:
    """Make a small VLM (or take `model.path`) and teach it the answer format on an expert's demonstrations."""
    config = config_of_words(words)
    if dry_run:
        _print_plan(config)
        return
    from cluster.warm_start import warm_start

    path = warm_start(config, overwrite=overwrite)
    typer.echo(f"warm-started model: {path}")


app.command()(demos)
app.add_typer(fleet_app, name="fleet")


@app.command()
def resume(
    run: RunPath,
    updates: Annotated[
        int | None, typer.Option(min=1, help="Train up to this many updates in all, if more than configured.")
    ] = None,
) -> None:
    """Continue a run that was interrupted, from its last checkpoint and its log of accepted trajectories."""
    from cluster.training import resume as run_resumed

    _print_summary(run_resumed(run, updates))


@app.command("eval")
def evaluate(
    words: Words,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name; default: model.path of the config.")
    ] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Held-out episodes; default: as configured.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; default: as configured.")] = None,
) -> None:
    """Measure a model's success on held-out episodes; prints JSON."""
    changes = {
        key: value
        for key, value in {
            "model.path": model,
            "training.evaluation_episodes": episodes,
            "training.evaluation_temperature": temperature,
        }.items()
        if value is not None
    }
    config = config_of_words([*words, *(f"{key}={json.dumps(value)}" for key, value in changes.items())])
    from cluster.training import evaluate as run_evaluation

    typer.echo(json.dumps(run_evaluation(config), indent=1))


@app.command()
def report(run: RunPath) -> None:
    """Write RUN/report.html: curves, sample episodes, and utterances shaded by influence."""
    from cluster.report import write_report
    from cluster.run_folder import RunFolder

    typer.echo(str(write_report(RunFolder.open_existing(run).path)))


app.command()(influence)
app.command()(serve)


@app.command()
def play(
    environment: Annotated[str, typer.Argument(metavar="ENV", help="For instance coso/NumberLine-v0.")],
    kwargs: Annotated[list[str] | None, typer.Argument(metavar="key=value...", help="Its arguments.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first episode.")] = 1,
    expert: Annotated[bool, typer.Option("--expert", help="Let the expert play instead of you.")] = False,
    noise: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the expert's random actions.")] = 0.0,
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes.")] = 1,
    frames: Annotated[Path | None, typer.Option(help="Folder to save every frame to, as PNG.")] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Stop an episode after this many steps.")] = 1000,
    model: Annotated[str | None, typer.Option(help="Let the model in this folder play instead of you.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="The model's sampling temperature; 0 is greedy.")] = 0.0,
    page: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Show the screen on a page at this port of loopback; 0: any.")
    ] = None,
) -> None:
    """Step an environment by hand, or watch its expert or a model, in the terminal or on a page."""
    from cluster.play import play as run_play
    from cluster.play_page import opened_page

    arguments = keyword_arguments(kwargs or [])
    if model is not None and expert:
        raise CosoError("--model and --expert both want to play; choose one")
    player = None
    if model is not None:
        from cluster.play_agent import ModelPlayer

        player = ModelPlayer(model, temperature, seed=seed)
    with opened_page(page, by_hand=not expert and player is None) as shown:
        run_play(environment, arguments, seed, expert, noise, episodes, frames, max_steps, player=player, page=shown)


@app.command("config")
def show_config(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="FILE.yaml... key.sub=value...", help="As for `coso train`.")
    ] = None,
    docs: Annotated[bool, typer.Option("--docs", help="Print the reference of every key as Markdown.")] = False,
) -> None:
    """Print the resolved config: every key with the value it would have."""
    if docs:
        from cluster.docs import config_markdown

        typer.echo(config_markdown(RunConfig), nl=False)
    else:
        typer.echo(to_yaml(config_of_words(words or [])), nl=False)


def _per_seed(config: RunConfig, seed: str | None) -> list[RunConfig]:
    if seed is None:
        return [config]
    try:
        seeds = [int(part) for part in seed.split(",")]
    except ValueError:
        raise CosoError(f"--seed {seed!r} is not a number nor a list of numbers like 1,2,3") from None
    if len(set(seeds)) < len(seeds):
        raise CosoError(f"--seed {seed!r} names a seed twice; each is a run of its own")
    values = config.model_dump()
    if len(seeds) == 1:
        return [validate({**values, "seed": seeds[0]})]
    return [validate({**values, "seed": each, "name": f"{config.name}-seed{each}"}) for each in seeds]


def _print_plan(config: RunConfig) -> None:
    from cluster.ray_runtime import local_cpus, required_resources, total_resources

    typer.echo(to_yaml(config))
    typer.echo("# resources")
    for name, row in required_resources(config).items():
        typer.echo(f"#   {name:16} {row['CPU']:6g} CPU {row['GPU']:6g} GPU")
    total = total_resources(config)
    typer.echo(f"#   {'in all':16} {total['CPU']:6g} CPU {total['GPU']:6g} GPU")
    if config.cluster.address is None:
        typer.echo(f"#   this machine would offer {local_cpus(config):g} CPU (cluster.oversubscribe)")
    environments = config.rollout.workers * config.rollout.envs_per_worker
    typer.echo(f"#   {environments} environment processes")


def _print_summary(summary: dict) -> None:
    before, after = summary["success_before"], summary["success_after"]
    typer.echo(
        f"\nsuccess before {before:.3f}  after {after:.3f}  ({summary['evaluation_note']})\nreport: {summary['report']}"
    )


def _end_on_terminate(number: int, frame: object) -> None:
    # Ended politely (SIGTERM), a run cleans up after itself as on Ctrl-C.
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: a `CosoError` is one message and exit code 1; Ctrl-C is exit code 130."""
    signal.signal(signal.SIGTERM, _end_on_terminate)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        # Typer turns Ctrl-C into an exit code that it returns, where it does not raise `Abort`.
        if code := app(standalone_mode=False):
            raise KeyboardInterrupt if code == INTERRUPTED else typer.Exit(code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except CosoError as error:
        if os.environ.get("COSO_TRACEBACK"):
            raise
        typer.echo(f"coso: {error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("coso: interrupted; everything it had started was ended", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own errors: usage, bad parameter
            error.show()
            sys.exit(error.exit_code)
        raise


if __name__ == "__main__":
    main()
