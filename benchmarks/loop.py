"""Utilisation by the loop: sync and async, fast and slow environments, rollouts against bare vLLM.

    python -m benchmarks.loop MODEL [--updates N] [--out benchmarks/results/loop.json]
    python -m benchmarks.loop MODEL --only-scoring --updates 168 --out benchmarks/results/scoring_overhead.json

MODEL is a warm-started model folder (`coso warmstart configs/numberline.yaml`). All numbers come from one invocation on
one machine; compare ratios, not absolute numbers. Each command takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
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


async def rollouts(model: str, seconds: float) -> tuple[float, list[dict[str, Any]], int]:
    """Rollout workers and a policy server alone: (tokens/s, steps, number of environments)."""
    import ray

    from actors.rollouts.stream import TrajectoryStream
    from cluster.config.files import load_config
    from cluster.launch.ray_runtime import ray_session
    from cluster.run.rollout_actors import start_policy_servers, start_rollout_workers, wait_for_servers

    config = load_config(["configs/numberline.yaml"], [f"model.path={model}"])
    with ray_session(config) as temporary:
        servers = start_policy_servers(config, temporary, "shared_memory", None)
        await wait_for_servers(config, servers)
        stream = ray.remote(TrajectoryStream).options(num_cpus=0, max_concurrency=1000).remote(1 << 30, 1 << 30)
        (worker,) = start_rollout_workers(config, list(servers.values()), stream)
        await worker.start.remote(0)
        await stream.take.remote(400, 120.0)  # warm
        (server,) = servers.values()
        before, begun = (await server.status.remote())["generated_tokens"], time.monotonic()
        await asyncio.sleep(seconds)
        rate = ((await server.status.remote())["generated_tokens"] - before) / (time.monotonic() - begun)
        batch = await stream.take.remote(500, 60.0)
        await worker.stop.remote()
        steps = batch.steps.select(["prompt", "image", "response_ids"]).to_pylist()
        for step in steps:
            step["png"] = batch.images[step["image"]]
        return rate, steps, config.rollout.envs_per_worker


def bare_engine(model: str, steps: list[dict[str, Any]], concurrent: int, temporary: str, seconds: float) -> float:
    """Tokens/s of vLLM's AsyncLLM alone, in this process, on the same prompts with answers of the same lengths."""
    from actors.images import decode_png
    from actors.serving.policy_engine import PolicyServerLaunch, policy_server_environment, start_engine
    from actors.settings import ModelSettings, PolicyServerSettings

    policy, settings = ModelSettings(path=model), PolicyServerSettings(max_model_len=256)
    launch = PolicyServerLaunch(index=0, run_seed=0, temp_folder=temporary)
    os.environ.update(policy_server_environment(policy, settings, launch))
    chat, engine = start_engine(policy, settings, launch)
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def measure() -> float:
        tokens, deadline, counting = 0, 0.0, False

        async def one(number: int) -> None:
            nonlocal tokens
            turn = 0
            while not deadline or time.monotonic() < deadline:
                step = steps[(number + concurrent * turn) % len(steps)]
                turn += 1
                parameters = SamplingParams(
                    temperature=1.0,
                    max_tokens=len(step["response_ids"]),
                    ignore_eos=True,
                    logprobs=0,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                prompt = {
                    "prompt_token_ids": chat.prompt_ids(step["prompt"]),
                    "multi_modal_data": {"image": decode_png(step["png"])},
                }
                async for output in engine.generate(prompt, parameters, request_id=f"{number}-{turn}"):
                    if counting:
                        tokens += len(output.outputs[0].token_ids)

        tasks = [asyncio.create_task(one(number)) for number in range(concurrent)]
        await asyncio.sleep(5.0)  # warm
        counting, begun = True, time.monotonic()
        await asyncio.sleep(seconds)
        counting, rate = False, tokens / (time.monotonic() - begun)
        deadline = time.monotonic()
        await asyncio.gather(*tasks)
        return rate

    rate = asyncio.run(measure())
    engine.shutdown()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="warm-started model folder")
    parser.add_argument("--updates", type=int, default=12, help="updates of each run (default 12)")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each throughput measurement, seconds")
    parser.add_argument(
        "--only-rollouts", action="store_true", help="measure only rollouts and bare vLLM, no training runs"
    )
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
        for environment in () if arguments.only_rollouts else ENVIRONMENTS:
            for mode in ("sync", "async"):
                runs.append(train(arguments.model, Path(folder), mode, environment, arguments.updates))
                print(json.dumps(runs[-1]), flush=True)
    rate, steps, concurrent = asyncio.run(rollouts(arguments.model, arguments.seconds))
    with tempfile.TemporaryDirectory(prefix="coso-") as folder:
        bare = bare_engine(arguments.model, steps, concurrent, folder, arguments.seconds)
    by_case = {(run["mode"], run["environment"]): run["env_steps_per_s"] for run in runs}
    result = {
        "runs": runs,
        "async_over_sync": {
            environment: by_case["async", environment] / by_case["sync", environment]
            for environment in ENVIRONMENTS
            if by_case
        },
        "rollout_tokens_per_s": rate,
        "bare_vllm_tokens_per_s": bare,
        "rollout_over_bare_vllm": rate / bare,
        "concurrent_requests": concurrent,
    }
    record(arguments.out, result)
    print(json.dumps({key: result[key] for key in ("async_over_sync", "rollout_over_bare_vllm")}, indent=1))


if __name__ == "__main__":
    main()
