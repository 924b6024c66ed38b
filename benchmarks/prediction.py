"""Environment steps per second as `coso plan` predicts them, beside those of the run that follows.

    python -m benchmarks.prediction MODEL [--address A] [--updates N] [--out benchmarks/results/prediction.json]

MODEL is a warm-started model folder (`coso warmstart configs/numberline.yaml`). For each case, `coso plan --measure`
measures rates on one config; the prediction is for another one, of the same or of a larger run, which is then trained.
Takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.loop import WARM_UP, run_words
from benchmarks.record import record
from cluster.config.files import config_of_words
from cluster.launch.nodes import local_node
from cluster.launch.placement import Node, needs_of, place, require_placed
from cluster.launch.prediction import Rates, predict
from cluster.launch.ray_runtime import ray_session
from cluster.telemetry.metrics import read_metrics

#: Name -> mode, environment of `benchmarks.loop`, what the run has that the measured one has not.
CASES: dict[str, tuple[str, str, list[str]]] = {
    "async, the config that was measured": ("async", "as fast as it is", []),
    "async, slow environments, twice as many": ("async", "200 ms a step", ["rollout.envs_per_worker=16"]),
    "sync, a second scorer": ("sync", "as fast as it is", ["scoring.workers=2"]),
}


def nodes_of(words: list[str]) -> tuple[Node, ...]:
    """The nodes that a run with these words has."""
    config = config_of_words(words)
    if config.cluster.address is None:
        return local_node(config)
    from cluster.launch.nodes import cluster_nodes

    with ray_session(config):
        return cluster_nodes(config)


def compare(model: str, folder: Path, case: str, updates: int, more: list[str]) -> dict[str, Any]:
    """Measure, predict, train; returns both figures and the measured rates."""
    mode, environment, larger = CASES[case]
    name = f"case{list(CASES).index(case)}"
    words = [*run_words(model, folder, mode, environment, updates, name), *more]
    coso = [sys.executable, "-m", "cluster.cli.main"]
    rates_file = folder / f"{name}.json"
    subprocess.run(
        [*coso, "plan", *words, "--measure", "--rates", str(rates_file)], check=True, stdout=subprocess.DEVNULL
    )
    rates, config = Rates.read(rates_file), config_of_words([*words, *larger])
    plan = place(nodes_of(words), needs_of(config))
    require_placed(plan)
    prediction = predict(config, plan, rates)
    subprocess.run([*coso, "train", *words, *larger], check=True, stdout=subprocess.DEVNULL)
    # The last row includes the final evaluation and checkpoint, which a prediction does not.
    rows = [row for row in read_metrics(folder / name / "metrics.jsonl") if WARM_UP < row["update"] < updates]
    made = sum(row["rollout/steps"] for row in rows) / sum(row["time/total"] for row in rows)
    return {
        "case": case,
        "predicted_steps_per_s": prediction.steps_per_s,
        "measured_steps_per_s": made,
        "error": prediction.steps_per_s / made - 1,
        "limiting": prediction.limiting,
        "limits": dict(prediction.limits),
        "updates": len(rows),
        "rates": rates.model_dump(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--address", help="of a Ray cluster; without it, this machine")
    parser.add_argument("--updates", type=int, default=14)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prediction.json"))
    options = parser.parse_args()
    more = [f"cluster.address={options.address}"] if options.address else []
    model = str(Path(options.model).absolute())
    with tempfile.TemporaryDirectory() as folder:
        found = [compare(model, Path(folder), case, options.updates, more) for case in CASES]
    print(json.dumps(record(options.out, {"cases": found}), indent=1))


if __name__ == "__main__":
    main()
