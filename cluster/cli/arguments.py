"""Arguments and output that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.config.files import to_yaml
from cluster.config.run_config import RunConfig

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE.yaml... key.sub=value...",
        help="Config files, later ones override earlier ones; then overrides, which win.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved config and the resources it needs; start nothing.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier run of this name.")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="What somebody else's run folder names of code or servers, and you trust; may be given several times.",
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for instance runs/numberline.")]


def print_plan(config: RunConfig) -> None:
    """`--dry-run`: print the resolved config and the resources it needs.

    Raises `CosoError` for an environment that is unknown or whose module cannot be imported.
    """
    from cluster.launch.preflight import preflight
    from cluster.launch.ray_runtime import local_cpus, required_resources, total_resources

    preflight(config)
    typer.echo(to_yaml(config))
    typer.echo("# resources")
    for name, row in required_resources(config).items():
        typer.echo(f"#   {name:16} {row['CPU']:6g} CPU {row['GPU']:6g} GPU")
    total = total_resources(config)
    typer.echo(f"#   {'total':16} {total['CPU']:6g} CPU {total['GPU']:6g} GPU")
    if config.cluster.address is None:
        typer.echo(f"#   this machine offers {local_cpus(config):g} CPU (cluster.oversubscribe)")
    environments = config.rollout.workers * config.rollout.envs_per_worker
    typer.echo(f"#   {environments} environment processes")


def print_summary(summary: dict) -> None:
    """Print success before and after training, and the path of the report."""
    before, after = summary["success_before"], summary["success_after"]
    typer.echo(
        f"\nsuccess before {before:.3f}  after {after:.3f}  ({summary['evaluation_note']})\nreport: {summary['report']}"
    )
