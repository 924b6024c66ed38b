"""Whether memory stays constant in an asynchronous run of half an hour.

    python -m benchmarks.memory MODEL [key.sub=value ...] [--minutes 30] [--out benchmarks/results/memory.json]

Resident memory of the driver, the trajectory stream, and every policy server and rollout worker must stay within 10% of
its median over the last three quarters of the run; exit code 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import record

TOLERANCE = 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="warm-started model folder")
    parser.add_argument("overrides", nargs="*", help="config overrides")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the run, minutes (default 30)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    arguments = parser.parse_args()

    from cluster.telemetry.metrics import read_metrics

    with tempfile.TemporaryDirectory(prefix="coso-bench-") as folder:
        words = [
            "configs/numberline.yaml",
            f"model.path={arguments.model}",
            f"folder={folder}",
            "name=memory",
            "mode=async",
            "training.updates=100000",
            "training.evaluate_every=0",
            "training.evaluation_episodes=32",
            "training.checkpoint_every=20",
            "logging.console=false",
            *arguments.overrides,
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli.main", "train", *words], stdout=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + arguments.minutes * 60
            while time.monotonic() < deadline and process.poll() is None:
                time.sleep(1.0)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        rows = read_metrics(Path(folder) / "memory" / "metrics.jsonl")[1:]
    ends, total = [], 0.0
    for row in rows:
        total += row["time/total"]
        ends.append(total)
    late = [row for row, end in zip(rows, ends, strict=True) if end > total / 4]
    series = {}
    for key in sorted(key for key in late[0] if key.startswith("memory/") and key != "memory/host_used_mb"):
        values = [row[key] for row in late if row.get(key) is not None]
        median = statistics.median(values)
        series[key] = {
            "median_mb": median,
            "lowest": min(values) / median - 1,
            "highest": max(values) / median - 1,
            "flat": max(max(values) / median - 1, 1 - min(values) / median) <= TOLERANCE,
        }
    result = {
        "minutes": total / 60,
        "updates": len(rows),
        "env_steps": rows[-1]["environment_steps"],
        "queue_bytes_largest": max(row["queue/bytes"] for row in late),
        "memory_over_the_last_three_quarters": series,
    }
    print(json.dumps(record(arguments.out, result), indent=1))
    sys.exit(0 if all(entry["flat"] for entry in series.values()) else 1)


if __name__ == "__main__":
    main()
