"""The `coso` command. Heavy imports are inside the commands, so that `--help` and errors are fast."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from cluster.cli import alfworld
from cluster.cli.check import check
from cluster.cli.config import show_config
from cluster.cli.demos import demos
from cluster.cli.evaluate import evaluate
from cluster.cli.fleet import fleet_app
from cluster.cli.influence import influence
from cluster.cli.plan import plan
from cluster.cli.play import play
from cluster.cli.report import report
from cluster.cli.resume import resume
from cluster.cli.serve import serve
from cluster.cli.train import train
from cluster.cli.warmstart import warmstart
from cluster.errors import CosoError

#: Exit code after Ctrl-C or SIGTERM, as in shells.
INTERRUPTED = 130
#: What `pip install coso-rl` alone does not bring, since the CPU and GPU profiles need different builds.
STACK = ("torch", "vllm", "ray", "transformers", "peft", "deepspeed", "pyarrow", "safetensors", "tensorboard")

app = typer.Typer(
    name="coso",
    help="Online reinforcement learning of vision-language agents with Counterfactual Soft RL (CoSo).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"coso-rl {version('coso-rl')}")
        raise typer.Exit


@app.callback()
def _options(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass  # the option's callback has done it


app.command()(train)
app.command()(plan)
app.command()(warmstart)
app.command()(demos)
app.command()(resume)
app.command("eval")(evaluate)
app.command()(report)
app.command()(influence)
app.command()(serve)
app.command()(play)
app.command()(check)
app.command("config")(show_config)
app.add_typer(fleet_app, name="fleet")
app.add_typer(alfworld.app)


def _end_on_terminate(number: int, frame: object) -> None:
    # On SIGTERM a run cleans up as on Ctrl-C.
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: a `CosoError` is one message and exit code 1; Ctrl-C is exit code 130."""
    signal.signal(signal.SIGTERM, _end_on_terminate)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        # On Ctrl-C, Typer either raises `Abort` or returns an exit code.
        if code := app(standalone_mode=False):
            raise KeyboardInterrupt if code == INTERRUPTED else typer.Exit(code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except CosoError as error:
        if os.environ.get("COSO_TRACEBACK"):
            raise
        typer.echo(f"coso: {error}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in STACK or os.environ.get("COSO_TRACEBACK"):
            raise
        typer.echo(
            f"coso: this command needs {error.name}, which is not installed; install the pinned packages of the "
            "project's requirements/cpu.txt or requirements/gpu.txt (in a checkout: make setup)",
            err=True,
        )
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("coso: interrupted; all processes were stopped", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own errors: usage, bad parameter
            error.show()
            sys.exit(error.exit_code)
        raise


if __name__ == "__main__":
    main()
