"""NumberLine trained in bf16 with policy server and learner on one GPU, by the command that a user would give.

    python -m benchmarks.gpu.one_gpu [--model models/numberline] [--updates 12] [--adapters 0] [--turns 0]

The model is a warm-started model folder (`coso warmstart configs/numberline.yaml`). Each of the two takes half of the
GPU. After every update the run itself compares the engine's log-probabilities with the learner's (`sync_check`), and
stops where they differ. `--adapters 1` trains low-rank adapters. With `--turns 1` the two take turns in lock-step: the
engine sleeps while the learner trains, and the optimizer's state is in host memory while the engine answers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.card import arguments, finish, print_table

#: The first update compiles, opens caches and waits for rollouts.
WARM_UP_UPDATES = 2


def words(device: str, adapters: bool, turns: bool) -> list[str]:
    shared = [
        f"policy_server.device={device}",
        f"learner.device={device}",
        "policy_server.gpu_share=0.5",
        "learner.gpu_share=0.5",
        "policy_server.gpu_memory_utilization=0.1",
        "policy_server.kv_cache_bytes=1000000000",
        "model.dtype=bfloat16",
        "weight_sync.transport=shared_memory",
        "weight_sync.check_every=1",
        "training.evaluate_every=0",
    ]
    lora = ["learner.lora.rank=32", "learner.lora.alpha=64", "learner.lora.target=all-linear"]
    in_turn = ["mode=sync", "policy_server.sleep=true", "learner.offload_optimizer=true"]
    return shared + lora * adapters + in_turn * turns


def main() -> None:
    settings = arguments(__doc__, model="models/numberline", updates=12, adapters=0, turns=0)
    from cluster.telemetry.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cluster.cli.main", "train", "configs/numberline.yaml", f"folder={folder}"]
        command += [f"model.path={settings.model}", "name=run", f"training.updates={settings.updates}"]
        begun = time.monotonic()
        done = subprocess.run(
            [*command, *words(settings.device, bool(settings.adapters), bool(settings.turns))], check=False
        )
        wall = time.monotonic() - begun
        run = Path(folder, "run")
        if done.returncode:
            for log in sorted(run.glob("logs/*"))[:6]:
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}", file=sys.stderr)
            raise SystemExit(f"coso train ended with {done.returncode}")
        rows = [row for row in read_metrics(run / "metrics.jsonl") if row["update"] > WARM_UP_UPDATES]
        summary = json.loads((run / "summary.json").read_text())

    def mean(name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    figures = {
        "updates": settings.updates,
        "adapters": bool(settings.adapters),
        "turns": bool(settings.turns),
        "success_before": summary["success_before"],
        "success_after": summary["success_after"],
        "update_s": mean("time/update"),
        "sync_check_mean_difference": max(row["sync_check/mean_difference"] for row in rows),
        "sync_check_kl": max(row["sync_check/kl"] for row in rows),
        "clip_fraction": mean("learner/clip_fraction"),
        "wall_s": wall,
    }
    print_table("one GPU for both", [figures])
    finish("one_gpu", settings, figures)


if __name__ == "__main__":
    main()
