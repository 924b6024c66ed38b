"""CPU seconds of scoring per update, as a share of the machine's CPU seconds in the recorded run.

    coso train configs/numberline.yaml
    python -m benchmarks.scoring_share runs/numberline [--out benchmarks/results/scoring_share.json]

If learner and engines keep all cores busy, as on two cores, scoring adds its CPU time to an update. Wall times
(`benchmarks.loop --only-scoring`) scatter more than that. This scores the run's batches again with the real stage and
pool: SCM training, influence of every answer, fidelity. Takes half a minute on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import record

WARM_UP = 4
UPDATES = 10


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far of this process, the scorers and the SCM's trainer."""
    this = psutil.Process()
    found = {"driver": sum(this.cpu_times()[:2]), "scorers": 0.0, "SCM training": 0.0}
    for child in this.children(recursive=True):
        title = " ".join(child.cmdline())
        for name, start in (("scorers", "ray::Scorer"), ("SCM training", "ray::ScmTrainer")):
            if title.startswith(start):
                found[name] += sum(child.cpu_times()[:2])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with recorded trajectories")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scoring_share.json"))
    arguments = parser.parse_args()

    import ray

    from actors.chat import ChatProcessor
    from actors.trajectory import TrajectoryLog
    from cluster.config.files import load_config
    from cluster.environments import make_environment
    from cluster.report.page import latest_model
    from cluster.run.scoring_stage import ScoringStage, make_scoring_pool
    from cluster.telemetry.metrics import read_metrics

    config = load_config([arguments.run / "config.yaml"])
    chat = ChatProcessor(latest_model(arguments.run, config.model_dump()) or "")
    environment: Any = make_environment(config.environment.id, config.environment.kwargs).unwrapped
    log = TrajectoryLog(arguments.run / "trajectories")
    batches = [log.read(update) for update in log.updates()[: WARM_UP + UPDATES]]
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error")
    pool = make_scoring_pool(config, chat, environment.label_space.sizes, environment.parser)
    pool.start()
    stage = ScoringStage(config, pool, chat)
    before: dict[str, float] = {}
    for number, batch in enumerate(batches):
        if number == WARM_UP:
            before = cpu_seconds()
        stage.score(batch)
    after = cpu_seconds()
    pool.close()
    ray.shutdown()
    taken = {name: (after[name] - before[name]) / UPDATES for name in after}
    update_s = statistics.median(row["time/total"] for row in read_metrics(arguments.run / "metrics.jsonl")[1:])
    cores = len(os.sched_getaffinity(0))
    result = {
        "answers_per_update": statistics.mean(map(len, batches[WARM_UP:])),
        "cpu_seconds_per_update": taken,
        "median_seconds_of_the_runs_updates": update_s,
        "share_of_the_machine": sum(taken.values()) / (update_s * cores),
    }
    print(json.dumps(record(arguments.out, result), indent=1))


if __name__ == "__main__":
    main()
