"""`coso alfworld`: make ALFWorld games from the data in the `alfworld` wheel, and check a folder of games."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import CosoError
from cluster.replacing import replaced_folder

if TYPE_CHECKING:
    from envs.alfworld.building import BuildOutcome

app = typer.Typer(name="alfworld", help="Make ALFWorld games, and check folders of games.", no_args_is_help=True)

#: Deadline for making or checking one game, seconds.
_DEADLINE_S = 300.0
#: The file that records how a folder of games was made.
_RECORD = "made.json"

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A folder of games, in the layout of the published set.")
]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="Only this task type; may be given several times.")]
Plans = Annotated[
    list[int] | None, typer.Option("--floor-plan", help="Only this floor plan; may be given several times.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")]


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write the games.")],
    train: Annotated[int, typer.Option(min=0, help="Training games per floor plan and task type.")] = 3,
    seen: Annotated[int, typer.Option(min=0, help="Held-out games per training floor plan and task type.")] = 1,
    unseen: Annotated[int, typer.Option(min=0, help="Games per held-out floor plan and task type.")] = 3,
    task: Tasks = None,
    floor_plan: Plans = None,
    target: Annotated[
        str, typer.Option("--object", help="Only games about this kind of object, for instance SoapBar.")
    ] = "",
    receptacle: Annotated[
        str, typer.Option(help="Only games with this kind of goal receptacle, for instance Toilet.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed; it determines every game.")] = 1,
    horizon: Annotated[int, typer.Option(min=1, help="Most steps the expert may take to win.")] = 50,
    workers: Workers = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
) -> None:
    """Make games of all or some floor plans and task types; the expert solves each one. Prints a summary as JSON."""
    from envs.alfworld.building import build_game
    from envs.alfworld.games import DATA_FOLDER
    from envs.alfworld.making import requests

    _check_scope(task, floor_plan)
    wanted = [
        request
        for split, count in (("train", train), ("seen", seen), ("unseen", unseen))
        for request in requests(split, count, seed, task or (), floor_plan or (), target, receptacle)
    ]
    if not wanted:
        raise CosoError("no game can be made: no floor plan of the split has a room for the task")
    with replaced_folder(folder, "folder of games", DATA_FOLDER, overwrite) as aside:
        jobs = [(f"game {request}", build_game, (request, aside, horizon)) for request in wanted]
        outcomes = _in_processes("making games", jobs, workers)
        summary = _summary(outcomes, seed, horizon)
        if not summary["games"]:
            raise CosoError(f"no game could be made; the first problem: {outcomes[0].problem}")
        (aside / _RECORD).write_text(json.dumps(summary, indent=1))
    typer.echo(json.dumps(summary, indent=1))


@app.command()
def check(
    folder: Folder,
    play: Annotated[bool, typer.Option("--play", help="The expert also plays every game.")] = False,
    horizon: Annotated[int, typer.Option(min=1, help="Most steps the expert may take, with --play.")] = 50,
    workers: Workers = None,
) -> None:
    """Load every game of a folder. Prints JSON: names of broken, missing and unsolvable games, number of good ones."""
    from envs.alfworld.building import check_game
    from envs.alfworld.games import NoGames, list_games
    from envs.alfworld.names import SPLITS

    paths = []
    for split in SPLITS:
        try:
            paths += list_games(folder, split)
        except NoGames:
            continue
    if not paths:
        raise CosoError(f"no ALFWorld games in {folder}; make some with `coso alfworld make {folder}`")
    results = _in_processes(
        "checking games", [(f"game {path.name}", check_game, (path, horizon if play else 0)) for path in paths], workers
    )
    bad = {path.name: result.problem for path, result in zip(paths, results, strict=True) if result.problem}
    fine = [(path, result) for path, result in zip(paths, results, strict=True) if not result.problem]
    counted = Counter(path.name.split("/")[0] for path, _ in fine)
    summary: dict[str, Any] = {"games": len(fine), "splits": dict(counted), "bad": bad}
    if play:
        summary["won_by_expert"] = sum(result.steps is not None for _, result in fine)
        summary["horizon"] = horizon
    typer.echo(json.dumps(summary, indent=1))
    if bad:
        raise CosoError(f"{len(bad)} of {len(paths)} games cannot be played; environments skip them")


def _check_scope(tasks: list[str] | None, plans: list[int] | None) -> None:
    from envs.alfworld.names import FLOOR_PLANS, TASKS

    for task in tasks or ():
        if task not in TASKS:
            raise CosoError(f"--task {task!r} is unknown; choose one of {', '.join(TASKS)}")
    for plan in plans or ():
        if plan not in FLOOR_PLANS:
            raise CosoError(
                f"--floor-plan {plan} does not exist; the floor plans are 1-30, 201-230, 301-330 and 401-430"
            )


def _in_processes(title: str, jobs: list[tuple[str, Any, tuple[Any, ...]]], workers: int | None) -> list[Any]:
    """Run jobs (name, function, arguments) in `workers` processes (None: one per core); returns results in order."""
    from cluster.telemetry.progress import progress_bar
    from envs.alfworld.engine import EngineMissing, import_engine

    try:
        import_engine()
    except EngineMissing as error:
        raise CosoError(str(error)) from None
    results = []
    # Fork from a clean process, because this one may have threads.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(min(workers or os.cpu_count() or 1, len(jobs)), mp_context=context)
    try:
        with progress_bar(title, len(jobs)) as advance:
            futures: list[Future[Any]] = [pool.submit(function, *arguments) for _, function, arguments in jobs]
            for (name, _, _), future in zip(jobs, futures, strict=True):
                try:
                    results.append(future.result(_DEADLINE_S))
                except FutureTimeout:
                    raise CosoError(f"{name} did not finish within {_DEADLINE_S:g} s") from None
                except BrokenProcessPool:
                    raise CosoError(f"a worker process died during {name} or another game of that time") from None
                advance()
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return results


def _summary(outcomes: list[BuildOutcome], seed: int, horizon: int) -> dict[str, Any]:
    made = [outcome for outcome in outcomes if outcome.steps is not None]
    steps = [outcome.steps for outcome in made if outcome.steps is not None]
    unsolved = [name for outcome in outcomes for name in outcome.unsolved]
    games: dict[str, dict[str, int]] = {}
    for outcome in made:
        counts = games.setdefault(outcome.request.split, {})
        counts[outcome.request.task] = counts.get(outcome.request.task, 0) + 1
    return {
        "seed": seed,
        "horizon": horizon,
        "games": games,
        "in_all": len(made),
        "floor_plans": len({outcome.request.floor_plan for outcome in made}),
        "expert_steps": {"mean": round(sum(steps) / len(steps), 2), "largest": max(steps)} if steps else {},
        "drawn_again_because_the_expert_did_not_win": unsolved,
        "impossible": sorted({outcome.problem for outcome in outcomes if outcome.steps is None}),
    }
