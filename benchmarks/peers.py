"""Samples generated and trained on per second, beside TRL's GRPO trainer on the same machine.

    coso warmstart configs/numberline.yaml
    python -m benchmarks.peers models/numberline [--python VENV/bin/python] [--out benchmarks/results/peers.json]

Both train the same small VLM on a task of one answer (`benchmarks/one_step.py`): the same 24 pictures, 192 answers an
update, 8 to a picture (ours draws pictures, so 8 on average), one pass over them in minibatches of 64, float32. Ours is
the whole system by `configs/numberline.yaml` in async mode, with 64 environments, without entropy bonus, with PPO's
value head. TRL's trainer is GRPO as it comes, without reference model; it generates 192 answers at once with
transformers, since its vLLM mode needs a GPU. It runs with one thread of torch and with one per core, and the faster
counts. Cores are the same: those that this process may use.

TRL lives in an environment of its own: `--python` names its Python. Without it, one is made in `runs/peers/venv`, which
takes torch and transformers from the environment that runs this, and TRL from the package index.

A sample counts when it was generated and trained on. Counted are the updates between the warm-up and the last one.
CPU seconds are those of all processes of a side. On a machine with other work, compare CPU seconds rather than
wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.one_step import ID
from benchmarks.record import record

SAMPLES, ANSWERS, MINIBATCH, MAX_NEW_TOKENS, LEARNING_RATE = 192, 8, 64, 64, 1e-5
#: Updates left out at the start, while queues fill and caches warm up. The last one is left out too.
WARM_UP = 2
POLL_S = 0.1
FOLDER = Path("runs/peers")
PACKAGES = ("trl==1.16.0", "datasets==5.2.0")
#: What processes of ours do, by a part of their command line (Ray writes what an actor is into it).
STAGES = {
    "ray::PolicyServer": "policy server",
    "VLLM": "policy server",
    "ray::RolloutWorker": "rollout worker",
    "environment_process": "environments",
    "ray::LearnerRank": "learner",
    "cluster.cli.main": "driver",
}


@dataclass
class CpuClock:
    """CPU seconds of a process and of all that it started. What has ended counts as of the reading before."""

    root: psutil.Process
    seconds: dict[tuple[int, float], tuple[str, float]] = field(default_factory=dict)

    def read(self) -> dict[str, float]:
        """CPU seconds so far, by stage."""
        for process in [self.root, *self.root.children(recursive=True)]:
            try:
                used = process.cpu_times()
                name = stage_of(" ".join([process.name(), *process.cmdline()]))
                self.seconds[process.pid, process.create_time()] = name, used.user + used.system
            except psutil.NoSuchProcess:
                continue
        total: dict[str, float] = {}
        for stage, seconds in self.seconds.values():
            total[stage] = total.get(stage, 0.0) + seconds
        return total


def stage_of(command: str) -> str:
    return next((stage for part, stage in STAGES.items() if part in command), "Ray and others")


@dataclass(frozen=True)
class Mark:
    """The end of an update: seconds on the clock, CPU seconds so far by stage."""

    at: float
    cpu: dict[str, float]


def watched(command: list[str], count: Callable[[], int], environment: dict[str, str]) -> list[Mark]:
    """Run a program to its end; a mark for each time that `count` (of updates done) has risen by one."""
    marks: list[Mark] = []
    log = FOLDER / "output.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment)
        clock = CpuClock(psutil.Process(process.pid))
        try:
            while process.poll() is None:
                if (done := count()) > len(marks):
                    mark = Mark(time.monotonic(), clock.read())
                    marks.extend([mark] * (done - len(marks)))
                time.sleep(POLL_S)
        finally:
            process.kill()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: see {log}\n{log.read_text(encoding='utf-8')[-2000:]}")
    return marks


def rates(marks: list[Mark], samples: list[int]) -> dict[str, Any]:
    """Of the updates after the warm-up and before the last. samples: trained on in each update."""
    first, last = marks[WARM_UP - 1], marks[-2]
    trained = sum(samples[WARM_UP:-1])
    wall = last.at - first.at
    cpu = {stage: last.cpu[stage] - first.cpu.get(stage, 0.0) for stage in last.cpu}
    total = sum(cpu.values())
    return {
        "updates": len(marks) - 1 - WARM_UP,
        "samples": trained,
        "samples_per_s": trained / wall,
        "samples_per_cpu_s": trained / total,
        "cores_busy": total / wall,
        "cpu_ms_per_sample": {stage: 1000 * seconds / trained for stage, seconds in sorted(cpu.items())},
    }


# --- ours


def ours(model: str, updates: int, passes: int) -> dict[str, Any]:
    from cluster.telemetry.metrics import read_metrics

    words = [
        "configs/numberline.yaml",
        f"environment.id=benchmarks.one_step:{ID}",
        f"model.path={model}",
        f"folder={FOLDER}",
        "name=ours",
        "entropy.mode=none",
        f"training.updates={updates}",
        f"training.steps_per_update={SAMPLES}",
        "training.evaluate_every=0",
        "training.evaluation_episodes=8",
        "training.checkpoint_every=1000",
        f"rollout.envs_per_worker={MINIBATCH}",
        f"rollout.max_new_tokens={MAX_NEW_TOKENS}",
        f"learner.minibatch={MINIBATCH}",
        f"learner.learning_rate={LEARNING_RATE}",
        "learner.final_learning_rate=0",
        f"algorithm.epochs={passes}",
        "algorithm.kl_limit=null",
        "logging.console=false",
    ]
    metrics = FOLDER / "ours" / "metrics.jsonl"

    def done() -> int:
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        return sum('"learner/optimizer_steps"' in line for line in lines)

    marks = watched([sys.executable, "-m", "cluster.cli.main", "train", *words], done, {"PYTHONPATH": os.getcwd()})
    rows = [row for row in read_metrics(metrics) if "learner/optimizer_steps" in row]
    counted = rows[WARM_UP:-1]
    return {
        **rates(marks, [int(row["rollout/steps"]) for row in rows]),
        "seconds_per_update": {
            name: sum(row.get(f"time/{name}", 0.0) for row in counted) / len(counted)
            for name in ("total", "wait", "collect", "update", "publish")
        },
        "response_tokens": sum(row["rollout/response_tokens"] for row in counted) / len(counted),
    }


# --- theirs


def environment_of_trl() -> str:
    """The Python of an environment with TRL, made on the first call."""
    folder = FOLDER / "venv"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        shared = folder / "lib" / version / "site-packages" / "shared.pth"
        shared.write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return str(python)


def trl(python: str, model: str, updates: int, passes: int, threads: int) -> dict[str, Any]:
    path = FOLDER / "marks.jsonl"
    path.unlink(missing_ok=True)

    def done() -> int:
        return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0

    words = {"samples": SAMPLES, "answers": ANSWERS, "minibatch": MINIBATCH, "passes": passes, "updates": updates,
             "max-new-tokens": MAX_NEW_TOKENS, "learning-rate": LEARNING_RATE, "threads": threads}  # fmt: skip
    options = [f"--{name}={value}" for name, value in words.items()]
    environment = {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    marks = watched([python, "-m", "benchmarks.peers_trl", model, str(FOLDER), *options], done, environment)
    noted = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first, last = noted[WARM_UP - 1], noted[-2]
    result = rates(marks, [SAMPLES] * len(marks))
    spent = {stage: 1000 * (last[stage] - first[stage]) / result["samples"] for stage in last}
    spent["optimizer and others"] = spent.pop("all") - sum(spent[stage] for stage in ("generate", "prepare", "learn"))
    return {**result, "threads": threads, "cpu_ms_per_sample": spent}


def versions(python: str) -> dict[str, str]:
    names = ["trl", "transformers", "torch"]
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return dict(zip(names, found.stdout.split(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="warm-started model folder")
    parser.add_argument("--python", help="Python of an environment with TRL (default: made in runs/peers/venv)")
    parser.add_argument("--updates", type=int, default=10, help="updates of each side, at least 4 (default 10)")
    parser.add_argument("--passes", type=int, default=1, help="passes over the samples of an update (default 1)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    arguments = parser.parse_args()
    if arguments.updates < WARM_UP + 2:
        parser.error(f"--updates must be at least {WARM_UP + 2}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(FOLDER / "ours", ignore_errors=True)
    python = arguments.python or environment_of_trl()
    cores = len(os.sched_getaffinity(0))
    theirs = [
        trl(python, arguments.model, arguments.updates, arguments.passes, threads) for threads in sorted({1, cores})
    ]
    mine = ours(arguments.model, arguments.updates, arguments.passes)
    fastest = {key: max(each[key] for each in theirs) for key in ("samples_per_s", "samples_per_cpu_s")}
    result = {
        "versions": versions(python),
        "passes": arguments.passes,
        "ours": mine,
        "trl": theirs,
        "times_as_fast_by_wall_clock": mine["samples_per_s"] / fastest["samples_per_s"],
        "times_as_fast_by_cpu_time": mine["samples_per_cpu_s"] / fastest["samples_per_cpu_s"],
    }
    print(json.dumps(record(arguments.out, result), indent=1))


if __name__ == "__main__":
    main()
