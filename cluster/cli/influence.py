"""`coso influence RUN`: show which tokens determined the actions, in the terminal, as a page and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.arguments import Trust


def influence(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for instance runs/numberline.")],
    update: Annotated[
        list[int] | None,
        typer.Option(min=1, help="An update to show; repeat the option to compare. Default: the first and the last."),
    ] = None,
    answers: Annotated[int, typer.Option(min=1, help="Number of screens to show, each with its answers.")] = 4,
    estimator: Annotated[
        str | None,
        typer.Option(
            help="Score again with scm, parser, scm+parser, gradient or uniform, from the latest checkpoint; "
            "default: the scores of the run."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for influence.html and influence.png; default: the run folder.")
    ] = None,
    trust: Trust = None,
) -> None:
    """Show answers before and after training; each token is shaded by its influence on the action."""
    from rich.console import Console
    from rich.text import Text

    from cluster.errors import CosoError
    from cluster.replacing import replace_text
    from cluster.report.influence import influence_view, page, picture
    from cluster.run.run_folder import RunFolder
    from scoring.effects.estimators import ESTIMATORS
    from scoring.pictures import profile_line, shade_ansi

    if estimator is not None and estimator not in ESTIMATORS:
        raise CosoError(f"--estimator {estimator!r}: choose one of {', '.join(ESTIMATORS)}")
    opened = RunFolder.open_existing(run)
    view = influence_view(opened, update or [], answers, estimator, trust or ())
    terminal = Console(highlight=False, soft_wrap=True)
    terminal.print(
        Text(f"{view.name}: influence on the action by {view.estimator}, none to most ", style="bold"), end=""
    )
    terminal.print(shade_ansi([" "] * 11, [step / 10 for step in range(11)]))
    for group in view.answers:
        terminal.print()
        for answer in group:
            terminal.print(Text(answer.title, style="dim"))
            terminal.print(shade_ansi(answer.texts, answer.values))
    terminal.print()
    for shown, profile in view.profiles.items():
        words = ", ".join(f"{text} {mean:.2f}" for text, mean, _ in view.words[shown][:6])
        terminal.print(Text(f"update {shown:4}  {profile_line(profile)}  {words}"))
    folder = out or opened.path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "influence.html", page(view), errors="replace")
        (folder / "influence.png").unlink(missing_ok=True)  # it may be a link to another file
        picture(view).save(folder / "influence.png")
    except OSError as error:
        raise CosoError(f"cannot write to {folder}: {error}") from None
    terminal.print(Text(f"{folder / 'influence.html'}  {folder / 'influence.png'}", style="dim"))
