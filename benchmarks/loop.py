"""Utilisation by the loop: sync and async, fast and slow environments.

    python -m benchmarks.loop MODEL [--updates N] [--out benchmarks/results/loop.json]
    python -m benchmarks.loop MODEL --only-scoring --updates 168 --out benchmarks/results/scoring_overhead.json

MODEL is a warm-started model folder (`coso warmstart configs/numberline.yaml`). All numbers come from one invocation on
one machine; compare ratios, not absolute numbers. Each command takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.record import record

#: Updates left out at the start of a run, while queues fill and caches warm up.
WARM_UP = 2
ENVIRONMENTS = {
    "as fast as it is": ["environment.id=coso/NumberLine-v0", "environment.kwargs={invalid_action: penalty}"],
    "200 ms a step": [
        "environment.id=coso/SlowNumberLine-v0",
        "environment.kwargs={invalid_action: penalty, mean_ms: 200, sigma: 0.5}",
    ],
}
#: Number of updates in a block with scoring on or off, when measuring its overhead.
BLOCK = 4
STAGES = ("policy_servers", "learner", "scorers", "environments")


def run_words(model: str, folder: Path, mode: str, environment: str, updates: int, name: str) -> list[str]:
    """Arguments of `coso train` for a run without intermediate evaluations and checkpoints."""
    return [
        "configs/numberline.yaml",
        *ENVIRONMENTS[environment],
        f"model.path={model}",
        f"folder={folder}",
        f"name={name}",
        f"mode={mode}",
        f"training.updates={updates}",
        "training.evaluate_every=0",
        "training.evaluation_episodes=8",
        "training.checkpoint_every=1000",
        "logging.console=false",
    ]


def train(model: str, folder: Path, mode: str, environment: str, updates: int) -> dict[str, Any]:
    """Run one training through the command line; returns throughput after the warm-up and busy shares."""
    from cluster.telemetry.metrics import read_metrics

    name = f"{mode}-{list(ENVIRONMENTS).index(environment)}"
    words = run_words(model, folder, mode, environment, updates, name)
    command = [sys.executable, "-m", "cluster.cli.main", "train", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    # The last row includes the final evaluation and checkpoint, which are not measured here.
    rows = [row for row in read_metrics(folder / name / "metrics.jsonl") if WARM_UP < row["update"] < updates]
    seconds = sum(row["time/total"] for row in rows)
    steps = sum(row["rollout/steps"] for row in rows)
    tokens = sum(row["rollout/steps"] * row["rollout/response_tokens"] for row in rows)
    busy = {stage: sum(row[f"busy/{stage}"] * row["time/total"] for row in rows) / seconds for stage in STAGES}
    return {
        "mode": mode,
        "environment": environment,
        "updates": len(rows),
        "seconds_per_update": statistics.median(row["time/total"] for row in rows),
        "env_steps_per_s": steps / seconds,
        "tokens_per_s": tokens / seconds,
        "busy": busy,
    }


def scoring_overhead(model: str, folder: Path, updates: int) -> dict[str, Any]:
    """Overhead of scoring per update, from one async run in which scoring is alternately on and off.

    Separate runs with and without scoring would differ more by drift of the machine than by scoring. Neighbouring
    blocks of updates drift less, and the order of on and off alternates between pairs, which cancels a steady drift. In
    an unscored batch all tokens have the same weight, so the learner's work is the same.
    """
    from actors.trajectory import TrajectoryBatch
    from cluster.config.files import load_config
    from cluster.run.system import System
    from cluster.telemetry.metrics import read_metrics
    from cluster.training import train as train_here

    def is_scored(update: int) -> bool:
        """Whether scoring is on during an update; it then scores the batch of the next update."""
        return update // BLOCK % 4 in (0, 3)

    measured = System.score
    batches = itertools.count()

    def by_turns(system: System, batch: TrajectoryBatch) -> tuple[TrajectoryBatch, dict[str, float]]:
        if is_scored(next(batches)):
            return measured(system, batch)
        return batch.with_influence([np.ones(len(ids)) for ids in batch.ragged("response_ids", np.int32)]), {}

    words = run_words(model, folder, "async", "as fast as it is", updates, "by-turns")
    with mock.patch.object(System, "score", by_turns):
        train_here(load_config(words[:1], words[1:]))
    rows = [row for row in read_metrics(folder / "by-turns" / "metrics.jsonl") if 0 < row["update"] < updates]
    blocks: dict[int, list[dict[str, float]]] = {}
    for row in rows:
        number, place = divmod(int(row["update"]), BLOCK)
        # The first pair is warm-up; the first update of a block still has the queues of the previous block.
        if number >= 2 and place > 0:
            blocks.setdefault(number, []).append(row)
    seconds = {n: statistics.mean(row["time/total"] for row in made) for n, made in blocks.items()}
    pairs = [
        {"scored": seconds[n], "not scored": seconds[n + 1]}
        if is_scored(n * BLOCK)
        else {"scored": seconds[n + 1], "not scored": seconds[n]}
        for n in range(2, max(seconds), 2)
    ]
    added = [pair["scored"] / pair["not scored"] - 1.0 for pair in pairs]
    counted = [row for made in blocks.values() for row in made]
    return {
        "updates": updates,
        "updates_in_a_block": BLOCK,
        "seconds_per_update_in_pairs_of_blocks": pairs,
        "scoring_adds": statistics.mean(added),
        "standard_error": statistics.stdev(added) / math.sqrt(len(added)),
        "wait_seconds_per_update": statistics.median(row["time/wait"] for row in counted),
        "answers_per_update": statistics.mean(row["rollout/steps"] for row in counted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="warm-started model folder")
    parser.add_argument("--updates", type=int, default=12, help="updates of each run (default 12)")
    parser.add_argument(
        "--only-scoring",
        action="store_true",
        help="measure only the overhead of scoring, in one run with scoring alternately on and off",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loop.json"))
    arguments = parser.parse_args()
    if arguments.only_scoring:
        if arguments.updates < 6 * BLOCK:
            parser.error(f"--only-scoring compares blocks of {BLOCK} updates: use --updates {6 * BLOCK} or more")
        with tempfile.TemporaryDirectory(prefix="coso-bench-") as folder:
            measured = scoring_overhead(arguments.model, Path(folder), arguments.updates)
        print(json.dumps(record(arguments.out, measured), indent=1))
        return

    runs = []
    with tempfile.TemporaryDirectory(prefix="coso-bench-") as folder:
        for environment in ENVIRONMENTS:
            for mode in ("sync", "async"):
                runs.append(train(arguments.model, Path(folder), mode, environment, arguments.updates))
                print(json.dumps(runs[-1]), flush=True)
    by_case = {(run["mode"], run["environment"]): run["env_steps_per_s"] for run in runs}
    result = {
        "runs": runs,
        "async_over_sync": {
            environment: by_case["async", environment] / by_case["sync", environment] for environment in ENVIRONMENTS
        },
    }
    record(arguments.out, result)
    print(json.dumps(result["async_over_sync"], indent=1))


if __name__ == "__main__":
    main()
