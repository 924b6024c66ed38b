"""Decoupled and plain PPO on data of a pinned age: success after equally many taken steps, and how both degrade.

    python -m benchmarks.off_policy run [--games numberline,ezpoints] [--lags 0,1,2,4,8] [--seeds 1,2,3]
    python -m benchmarks.off_policy report [--out benchmarks/results/off_policy.json]

`run` makes every run of the table that is not done yet, one after the other, and notes each in a line of
`runs/off_policy/runs.jsonl`; so it may be interrupted at any time, and `--at-most N` ends it after N runs. A run counts
for one state of the program (`commit`: the last one that changed the code). `report` makes the table.

A run is a whole training in lock-step by the game's config, so its result does not depend on the machine's load. At a
lag of L, update u trains on the batch that version u − 1 − L collected; until there is such a version, on a batch of
version 0. So the lag of update u is min(u − 1, L). The first L + 1 batches are collected before the first update, and
none is collected that no update would use: all runs of a game take the same number of batches. A batch is of whole
episodes, which are longer where the policy is worse; `env_steps` says how many steps were taken. Every run checks its
lags in its own metrics. Nothing is dropped, since in lock-step the learner has no limit of lag.

decoupled: the config's algorithm, which clips around the policy as the update begins and weighs by its truncated ratio
to the policy that sampled. plain: one clip, around the policy that sampled (`algorithm.decoupled=false`). All else is
the same; `WORDS` and `GAMES` say in what runs differ from the config. There is no entropy bonus, so no scoring.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.record import record

LAGS = (0, 1, 2, 4, 8)
SEEDS = (1, 2, 3)
VARIANTS = {"decoupled": "algorithm.decoupled=true", "plain": "algorithm.decoupled=false"}
#: What the runs of both variants have in common, beside the game's config. They are short, and learn faster than the
#: config says: what is old is then also far away.
WORDS = [
    "mode=sync",
    "entropy.mode=none",
    "rollout.envs_per_worker=8",
    "learner.learning_rate=1.0e-3",
    "learner.final_learning_rate=2.0e-4",
    "learner.minibatch=32",
    "training.updates=20",
    "training.steps_per_update=48",
    "training.evaluate_every=0",
    "training.evaluation_episodes=64",
    "training.evaluation_temperature=1.0",
    "training.checkpoint_every=1000",
    "weight_sync.check_every=5",
    "logging.console=false",
]
#: Overrides of each game's config.
GAMES: dict[str, list[str]] = {"numberline": [], "ezpoints": ["training.steps_per_update=64"]}
#: Code that a run depends on: what a run was made by is the last commit that changed any of it.
PROGRAM = ("actors", "cluster", "configs", "envs", "learner", "benchmarks/off_policy.py")
FOLDER = Path("runs/off_policy")
#: 97.5% quantiles of Student's t by degrees of freedom, for intervals over few seeds.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
#: What identifies a run.
KEY = ("game", "lag", "variant", "seed", "commit")

Run = dict[str, Any]


class PinnedLag:
    """A collector that hands out every batch `lag` updates after it was collected (`cluster.run.collection.Collector`).

    To be used in lock-step. Until there is a batch of the right age, the ones that the run's first weights made.
    """

    overlaps = False

    def __init__(self, lag: int, updates: int, fresh: Any) -> None:
        """updates: the number that will be trained; no batch beyond is collected. fresh: collects without delay."""
        self._lag = lag
        self._updates = updates
        self._fresh = fresh
        self._collected = 0
        self._held: deque[tuple[Any, dict[str, float]]] = deque()
        self.published, self.trained, self.evaluate = fresh.published, fresh.trained, fresh.evaluate

    async def collect(self, update: int) -> tuple[Any, dict[str, float]]:
        while self._collected < min(update + self._lag, self._updates):
            self._collected += 1
            self._held.append(await self._fresh.collect(self._collected))
        return self._held.popleft()


# --- runs


def commit() -> str:
    """The last commit that changed the program, with "+" where files of it have changed since."""
    log = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", *PROGRAM], capture_output=True, text=True, check=True
    )
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", *PROGRAM], capture_output=True, text=True, check=True
    )
    return log.stdout.strip() + ("+" if changed.stdout.strip() else "")


def warm_started(game: str) -> None:
    """Make the model that all runs of the game begin with, unless it is there."""
    if not Path("models", game).exists():
        command = [sys.executable, "-m", "cluster.cli.main", "warmstart", f"configs/{game}.yaml"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def trained(key: Run, extra: Sequence[str]) -> Run:
    """Train one run; returns its line. Raises SystemExit where a batch has another lag than the pinned one."""
    from cluster.config.files import load_config
    from cluster.run.collection import SynchronousCollector
    from cluster.telemetry.metrics import read_metrics
    from cluster.training import train

    game, lag = key["game"], key["lag"]
    name = f"{game}-{key['variant']}-lag{lag}-seed{key['seed']}"
    words = [f"folder={FOLDER}", f"name={name}", f"seed={key['seed']}", *WORDS, *GAMES[game], VARIANTS[key["variant"]]]
    config = load_config([f"configs/{game}.yaml"], [*words, *extra])

    def pinned(of_run: Any, workers: Sequence[Any]) -> PinnedLag:
        return PinnedLag(lag, of_run.training.updates, SynchronousCollector(of_run, workers))

    begun = time.monotonic()
    with mock.patch("cluster.run.system.SynchronousCollector", pinned):
        summary = train(config, overwrite=True)
    rows = read_metrics(FOLDER / name / "metrics.jsonl")
    check_lags(rows, lag)
    shutil.rmtree(FOLDER / name)
    return {**key, "words": list(extra), **measured(rows, summary), "wall_seconds": round(time.monotonic() - begun, 1)}


def check_lags(rows: Sequence[dict[str, float]], lag: int) -> None:
    """Raise SystemExit unless every update trained on steps of the pinned lag only, and on all steps."""
    for row in rows:
        if (update := int(row["update"])) == 0:
            continue
        expected = min(update - 1, lag)
        found = row["lag/mean"], row["lag/max"]
        if found != (expected, expected) or row["steps/dropped"]:
            raise SystemExit(
                f"update {update} trained at a lag of {found[0]:g} (mean) and {found[1]:g} (largest) and dropped "
                f"{row['steps/dropped']:g} steps; {expected} and 0 were wanted"
            )


def measured(rows: Sequence[dict[str, float]], summary: dict[str, Any]) -> Run:
    """What a run is judged by; and means over the second half of its updates, which tell why."""
    updates = [row for row in rows if "learner/clip_fraction" in row]
    last = updates[len(updates) // 2 :]

    def mean(name: str) -> float:
        return round(statistics.mean(row[f"learner/{name}"] for row in last), 4)

    return {
        "success_after": summary["success_after"],
        "valid_after": round(rows[-1]["evaluation/valid_rate"], 4),
        "in_training": [round(row["rollout/success"], 3) for row in updates],
        "env_steps": summary["env_steps"],
        "steps_trained": summary["steps_trained"],
        "updates": summary["updates"],
        "clip_fraction": mean("clip_fraction"),
        "approx_kl": mean("approx_kl"),
        "update_kl": mean("update_kl"),
        "importance_weight": mean("importance_weight"),
        "importance_beyond_limit": mean("importance_beyond_limit"),
    }


def finished(path: Path) -> list[Run]:
    """The runs noted in `path`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run_all(arguments: argparse.Namespace) -> None:
    """Make the runs that are missing, seed by seed, so that what is there early compares everything."""
    path = FOLDER / "runs.jsonl"
    FOLDER.mkdir(parents=True, exist_ok=True)
    of_program = commit()
    done = {tuple(run[part] for part in KEY) for run in finished(path) if run["words"] == arguments.words}
    wanted = [
        {"game": game, "lag": lag, "variant": variant, "seed": seed, "commit": of_program}
        for seed in map(int, arguments.seeds.split(","))
        for game in arguments.games.split(",")
        for lag in map(int, arguments.lags.split(","))
        for variant in arguments.variants.split(",")
    ]
    missing = [key for key in wanted if tuple(key.values()) not in done]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are done", file=sys.stderr)
    for key in missing[: arguments.at_most]:
        warm_started(key["game"])
        line = json.dumps(trained(key, arguments.words))
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


# --- report


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of the seeds' values and the 95% interval of it by Student's t; no interval for a single seed."""
    mean = statistics.mean(values)
    result: dict[str, Any] = {"seeds": len(values), "mean": round(mean, 4)}
    if len(values) > 1:
        half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
        result["interval"] = [round(mean - half, 4), round(mean + half, 4)]
    return result


def cell(runs: Sequence[Run]) -> dict[str, Any]:
    """Success after training and in its rollouts, and what the updates were like."""
    return {
        "success_after": interval([run["success_after"] for run in runs]),
        "success_in_training": interval([statistics.mean(run["in_training"]) for run in runs]),
        "of_seeds": {run["seed"]: run["success_after"] for run in runs},
        **{
            name: round(statistics.mean(run[name] for run in runs), 4)
            for name in ("env_steps", "valid_after", "clip_fraction", "approx_kl", "importance_beyond_limit")
        },
    }


def table(runs: Sequence[Run]) -> dict[str, Any]:
    """{game: {lag: {variant: cell}}}, and under `difference` the mean over seeds of decoupled minus plain."""
    result: dict[str, Any] = {}
    for game in GAMES:
        for lag in sorted({run["lag"] for run in runs if run["game"] == game}):
            here = [run for run in runs if (run["game"], run["lag"]) == (game, lag)]
            by_variant = {name: [run for run in here if run["variant"] == name] for name in VARIANTS}
            row = {name: cell(of_variant) for name, of_variant in by_variant.items() if of_variant}
            after = [{run["seed"]: run["success_after"] for run in by_variant[name]} for name in VARIANTS]
            if both := sorted(after[0].keys() & after[1].keys()):
                row["difference"] = interval([after[0][seed] - after[1][seed] for seed in both])
            result.setdefault(game, {})[str(lag)] = row
    return result


def report(arguments: argparse.Namespace) -> None:
    of_program = arguments.commit or commit()
    everything = finished(FOLDER / "runs.jsonl")
    runs = [run for run in everything if run["commit"] == of_program and not run["words"]]
    if not runs:
        known = ", ".join(sorted({run["commit"] for run in everything})) or "none"
        raise SystemExit(f"{FOLDER}/runs.jsonl has no run of commit {of_program}, only of: {known}")
    found = table(runs)
    record(
        arguments.out,
        {
            "command": "python -m benchmarks.off_policy run; python -m benchmarks.off_policy report",
            "commit": of_program,
            "config": {game: [f"configs/{game}.yaml", *WORDS, *words] for game, words in GAMES.items()},
            "interval": "95%, Student's t over seeds",
            "by_game_and_lag": found,
        },
    )
    print("\n".join(markdown(found)))


def markdown(found: dict[str, Any]) -> list[str]:
    """The rows of the table in docs/algorithms.md: success at the end, mean and interval."""
    rows = []
    for game, lags in found.items():
        for lag, row in lags.items():
            figures = [row[name]["success_after"] if name in row else None for name in VARIANTS]
            cells = [game, lag, *map(shown, [*figures, row.get("difference")])]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def shown(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    between = "{:.2f} to {:.2f}".format(*figure["interval"]) if "interval" in figure else "one seed"
    return f"{figure['mean']:.3f} ({between})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="make the runs that are missing")
    run.add_argument("words", nargs="*", metavar="key.sub=value", help="overrides for every run, for trials")
    run.add_argument("--games", default=",".join(GAMES))
    run.add_argument("--lags", default=",".join(map(str, LAGS)))
    run.add_argument("--variants", default=",".join(VARIANTS))
    run.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    run.add_argument("--at-most", type=int, metavar="N", help="end after N runs")
    run.set_defaults(do=run_all)
    reporting = commands.add_parser("report", help="make the table of the runs")
    reporting.add_argument("--commit", help="of the runs; default: the present one")
    reporting.add_argument("--out", type=Path, default=Path("benchmarks/results/off_policy.json"))
    reporting.set_defaults(do=report)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
