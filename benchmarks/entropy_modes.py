"""Compare entropy bonuses: weighted by influence (CoSo), uniform over tokens, and none.

    coso warmstart configs/numberline.yaml
    python -m benchmarks.entropy_modes models/numberline [--seeds 1,2,3] [--out benchmarks/results/entropy_modes.json]

One run of `configs/numberline.yaml` per seed and mode, all from the same model and with the same coefficient.
"success_in_training" is the mean over updates of the share of successful sampled episodes; it measures learning speed.
Results are written after every run. A run takes four to five minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import record

MODES = ("counterfactual", "uniform", "none")


def trained(config: str, model: str, mode: str, seed: int, extra: list[str], folder: Path) -> dict[str, Any]:
    """Run one training through the command line; returns its results."""
    from cluster.telemetry.metrics import read_metrics

    name = f"{mode}-{seed}"
    words = [config, f"model.path={model}", f"folder={folder}", f"name={name}", f"entropy.mode={mode}", f"seed={seed}"]
    command = [sys.executable, "-m", "cluster.cli.main", "train", *words, "logging.console=false", *extra]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = read_metrics(folder / name / "metrics.jsonl")
    return {
        "mode": mode,
        "seed": seed,
        "evaluations": {int(row["update"]): row["evaluation/success"] for row in rows if "evaluation/success" in row},
        "success_in_training": statistics.mean(row["rollout/success"] for row in rows if "rollout/success" in row),
        "entropy_at_the_end": rows[-1]["learner/entropy"],
        "wall_seconds": json.loads((folder / name / "summary.json").read_text(encoding="utf-8"))["wall_seconds"],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds and standard deviation of a single seed, by mode."""
    found = {}
    for mode in MODES:
        of_mode = [run for run in runs if run["mode"] == mode]
        measures = {
            "success_in_training": [run["success_in_training"] for run in of_mode],
            "success_after": [list(run["evaluations"].values())[-1] for run in of_mode],
        }
        found[mode] = {
            name: {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}
            for name, values in measures.items()
            if values
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="warm-started model folder")
    parser.add_argument("words", nargs="*", metavar="key.sub=value", help="overrides of the config, for every run")
    parser.add_argument("--config", default="configs/numberline.yaml", help="config file of the runs")
    parser.add_argument("--seeds", default="1,2,3", help="seeds of every mode (default 1,2,3)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/entropy_modes.json"))
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="coso-bench-") as folder:
        for seed in map(int, arguments.seeds.split(",")):
            for mode in MODES:
                runs.append(trained(arguments.config, arguments.model, mode, seed, arguments.words, Path(folder)))
                print(json.dumps(runs[-1]), flush=True)
                result = record(arguments.out, {"by_mode": summary(runs), "runs": runs})
    print(json.dumps(result["by_mode"], indent=1))


if __name__ == "__main__":
    main()
