"""Progress bars and spinners for a terminal; plain lines without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Advance]:
    """Show a progress bar during the block; yields `advance(steps=1, note="")`."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, note="")
        done = 0
        next_line = total / 10

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done, next_line
            done += steps
            progress.update(task, advance=steps, note=note)
            if not console.is_terminal and done >= next_line:
                next_line += total / 10
                console.print(f"{title}: {done} of {total} {note}", highlight=False)

        yield advance


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show `text` with a spinner during the block."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text, highlight=False)
        yield
