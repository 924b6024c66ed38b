"""Success before and after training in several runs of one config, and how they went, as a table.

    coso train configs/numberline.yaml --seed 1,2,3
    python -m benchmarks.seeds runs/numberline-seed1 runs/numberline-seed2 runs/numberline-seed3 \\
        --out benchmarks/results/numberline_seeds.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from cluster.config.files import load_config
from cluster.telemetry.metrics import read_metrics

KEYS = ("seed", "success_before", "success_after", "eval_episodes", "env_steps", "updates", "wall_seconds",
        "recoveries", "mode", "entropy_mode")  # fmt: skip


def course(run: Path) -> dict[str, object]:
    """How a run went: every evaluation's success, and means over its updates."""
    rows = read_metrics(run / "metrics.jsonl")
    updates = [row for row in rows if "lag/mean" in row]
    means = {key: float(np.mean([row[key] for row in updates])) for key in ("lag/mean", "learner/clip_fraction")}
    taken = updates[-1]["environment_steps"]
    explained = [row["learner/explained_variance"] for row in updates[-len(updates) // 3 :]]
    return {
        "evaluations": [row["evaluation/success"] for row in rows if "evaluation/success" in row],
        "lag": round(means["lag/mean"], 3),
        "dropped_share": round(updates[-1]["steps/dropped"] / taken, 4),
        "clip_fraction": round(means["learner/clip_fraction"], 4),
        "largest_clip_fraction": round(max(row["learner/clip_fraction"] for row in updates), 4),
        "explained_variance_last_third": round(float(np.mean(explained)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="finished run folders")
    parser.add_argument("--config", default="configs/numberline.yaml", help="config file of the runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in arguments.runs]
    config = load_config([arguments.runs[0] / "config.yaml"])
    seeds = ",".join(str(summary["seed"]) for summary in summaries)
    result = {
        "command": f"coso warmstart {arguments.config}; coso train {arguments.config} --seed {seeds}",
        "evaluation_temperature": config.training.evaluation_temperature,
        "runs": [
            {key: summary[key] for key in KEYS} | course(run)
            for summary, run in zip(summaries, arguments.runs, strict=True)
        ],
    }
    for key in ("success_before", "success_after"):
        found = [summary[key] for summary in summaries]
        result[key] = {"lowest": min(found), "mean": sum(found) / len(found), "highest": max(found)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["runs"]:
        print(row)


if __name__ == "__main__":
    main()
