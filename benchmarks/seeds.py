"""Success before and after training in several runs of one config, as a table.

    coso train configs/numberline.yaml --seed 1,2,3
    python -m benchmarks.seeds runs/numberline-seed1 runs/numberline-seed2 runs/numberline-seed3 \\
        --out benchmarks/results/numberline_seeds.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cluster.config.files import load_config

KEYS = ("seed", "success_before", "success_after", "eval_episodes", "env_steps", "updates", "wall_seconds",
        "recoveries", "mode", "entropy_mode")  # fmt: skip


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
        "runs": [{key: summary[key] for key in KEYS} for summary in summaries],
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
