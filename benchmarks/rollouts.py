"""Tokens per second of one rollout worker with one policy server, beside vLLM's engine alone on the same prompts.

    python -m benchmarks.rollouts MODEL [--slots 32 64] [--seconds 10] [--rounds 3]

MODEL is a warm-started model folder (`coso warmstart configs/numberline.yaml`). The two are measured by turns, so that
a machine that becomes slower slows both; each figure is the median of the rounds. The bare engine is AsyncLLM, started
as a policy server starts it and at the same niceness, with as many requests in flight as there are slots: the prompts
of the rollouts, tokenised, with decoded pictures, and answers of the same lengths. CPU time is that of every process
that takes part, so other programs on the machine change it less than wall time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import record

#: Answers that are collected before anything is measured, per slot.
WARM_UP_STEPS = 4


def cpu_seconds(pids: Mapping[int, str]) -> dict[int, float]:
    """CPU time that each process has used so far, of those that live."""
    used = {}
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        used[pid] = times.user + times.system
    return used


class Meter:
    """Wall and CPU seconds of a measurement. roles: what each process does, by process id."""

    def __init__(self, roles: Mapping[int, str]) -> None:
        self._roles = dict(roles)
        self._cpu = cpu_seconds(roles)
        self._begun = time.monotonic()

    def figures(self, tokens: int) -> dict[str, Any]:
        """Tokens per second of wall and of CPU time, and milliseconds of CPU time per 1,000 tokens by role."""
        wall = time.monotonic() - self._begun
        by_role: Counter[str] = Counter()
        for pid, used in cpu_seconds(self._roles).items():
            by_role[self._roles[pid]] += used - self._cpu.get(pid, 0.0)
        return {
            "tokens_per_s": tokens / wall,
            "tokens_per_cpu_s": tokens / sum(by_role.values()),
            "cpu_ms_per_1000_tokens": {role: 1e6 * used / tokens for role, used in sorted(by_role.items())},
        }


class Rollouts:
    """A rollout worker, a policy server and the stream between worker and learner; nobody trains."""

    def __init__(self, config: Any, server: Any, worker: Any, stream: Any) -> None:
        self._config = config
        self._server, self._worker, self._stream = server, worker, stream
        self._starts = 0
        self._batch: Any = None

    @classmethod
    async def start(cls, config: Any, temporary: Path) -> Rollouts:
        import ray

        from actors.rollouts.stream import TrajectoryStream
        from cluster.launch.reservation import reserve
        from cluster.run.rollout_actors import start_policy_servers, start_rollout_workers, wait_for_servers

        places = reserve(config, "policy server", "rollout worker")
        servers = start_policy_servers(config, temporary, None, places)
        await wait_for_servers(config, list(servers.values()))
        stream = ray.remote(TrajectoryStream).options(num_cpus=0, max_concurrency=1000).remote(1 << 30, 1 << 30)
        (worker,) = start_rollout_workers(config, list(servers.values()), stream, places)
        return cls(config, *servers.values(), worker, stream)

    async def measure(self, seconds: float) -> dict[str, Any]:
        """Start the environments, measure for so long, and stop them."""
        self._starts += 1
        await self._worker.start.remote(self._starts)
        self._batch = await self._stream.take.remote(WARM_UP_STEPS * self._config.rollout.envs_per_worker, 300.0)
        before, meter = (await self._server.status.remote())["generated_tokens"], Meter(await self._roles())
        await asyncio.sleep(seconds)
        figures = meter.figures((await self._server.status.remote())["generated_tokens"] - before)
        await self._worker.stop.remote()
        return figures

    def sample(self) -> list[dict[str, Any]]:
        """Prompts, pictures and lengths of answers of some steps that were made."""
        batch = self._batch
        steps = batch.steps.select(["prompt", "image", "response_ids"]).to_pylist()
        return [
            {"prompt": step["prompt"], "png": batch.images[step["image"]], "tokens": len(step["response_ids"])}
            for step in steps
        ]

    async def _roles(self) -> dict[int, str]:
        server, worker = await self._server.status.remote(), await self._worker.status.remote()
        named = {server["pid"]: "policy server", worker["pid"]: "rollout worker"}
        named |= dict.fromkeys(server["engine_pids"], "engine") | dict.fromkeys(worker["environment_pids"], "envs")
        everything = {child.pid: "Ray" for child in psutil.Process().children(recursive=True)}
        return everything | {os.getpid(): "Ray"} | named


def serve_bare(connection: Connection, model: str, max_model_len: int, slots: int, temporary: str) -> None:
    """The bare engine, in a process of its own: receives steps, then seconds to measure; answers with figures."""
    from actors.serving.policy_engine import PolicyServerLaunch, policy_server_environment
    from actors.serving.policy_server import LOWEST_PRIORITY
    from actors.settings import ModelSettings, PolicyServerSettings

    os.nice(LOWEST_PRIORITY - os.nice(0))
    policy, settings = ModelSettings(path=model), PolicyServerSettings(max_model_len=max_model_len)
    launch = PolicyServerLaunch(index=0, run_seed=0, temp_folder=temporary)
    os.environ.update(policy_server_environment(policy, settings, launch))
    from actors.images import decode_png
    from actors.serving.policy_engine import start_engine

    chat, engine = start_engine(policy, settings, launch)
    requests = [
        ({"prompt_token_ids": chat.prompt_ids(step["prompt"])}, decode_png(step["png"]), step["tokens"])
        for step in connection.recv()
    ]
    asyncio.run(answer_measurements(connection, engine, requests, slots))  # one event loop, as the engine needs
    engine.shutdown()


async def answer_measurements(connection: Connection, engine: Any, requests: list[Any], slots: int) -> None:
    connection.send("ready")
    while seconds := await asyncio.to_thread(connection.recv):
        connection.send(await measure_bare(engine, requests, slots, seconds))


async def measure_bare(engine: Any, requests: list[Any], slots: int, seconds: float) -> dict[str, Any]:
    """Keep `slots` requests in flight for so long; the engine alone, without a policy server."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    answered, tokens, over = 0, 0, False

    async def one(slot: int) -> None:
        nonlocal answered, tokens
        turn = 0
        while not over:
            prompt, image, length = requests[(slot + slots * turn) % len(requests)]
            turn += 1
            parameters = SamplingParams(
                temperature=1.0,
                max_tokens=length,
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            whole: Any = {**prompt, "multi_modal_data": {"image": image}}
            async for output in engine.generate(whole, parameters, request_id=f"{time.monotonic_ns()}-{slot}"):
                answered += 1
                tokens += len(output.outputs[0].token_ids)

    tasks = [asyncio.create_task(one(slot)) for slot in range(slots)]
    while answered < WARM_UP_STEPS * slots:
        await asyncio.sleep(0.05)
    engines = {process.pid: "engine" for process in multiprocessing.active_children() if process.pid}
    before, meter = tokens, Meter({os.getpid(): "caller", **engines})
    await asyncio.sleep(seconds)
    figures = meter.figures(tokens - before)
    over = True
    await asyncio.gather(*tasks)
    return figures


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every figure, the median over the rounds."""
    roles = sorted({role for each in rounds for role in each["cpu_ms_per_1000_tokens"]})
    return {
        "tokens_per_s": statistics.median(each["tokens_per_s"] for each in rounds),
        "tokens_per_cpu_s": statistics.median(each["tokens_per_cpu_s"] for each in rounds),
        "cpu_ms_per_1000_tokens": {
            role: statistics.median(each["cpu_ms_per_1000_tokens"].get(role, 0.0) for each in rounds) for role in roles
        },
    }


async def compare(model: str, slots: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Rollouts and the bare engine by turns, with this number of slots."""
    from cluster.config.files import load_config
    from cluster.launch.ray_runtime import ray_session

    words = [f"model.path={model}", f"rollout.envs_per_worker={slots}"]
    config = load_config(["configs/numberline.yaml"], words)
    ours, theirs = [], []
    with ray_session(config) as temporary, tempfile.TemporaryDirectory(prefix="coso-") as scratch:
        rollouts = await Rollouts.start(config, temporary)
        await rollouts.measure(1.0)
        here, there = multiprocessing.Pipe()
        arguments = (there, model, config.policy_server.max_model_len, slots, scratch)
        bare = multiprocessing.get_context("spawn").Process(target=serve_bare, args=arguments)
        bare.start()
        here.send(rollouts.sample())
        await asyncio.to_thread(here.recv)
        for _ in range(rounds):
            ours.append(await rollouts.measure(seconds))
            here.send(seconds)
            theirs.append(await asyncio.to_thread(here.recv))
        here.send(0)
        bare.join()
    by_round = [own["tokens_per_s"] / other["tokens_per_s"] for own, other in zip(ours, theirs, strict=True)]
    measured, reference = medians(ours), medians(theirs)
    return {
        "slots": slots,
        "rollouts": measured,
        "bare_vllm": reference,
        "wall_over_bare": statistics.median(by_round),
        "wall_over_bare_by_round": by_round,
        "cpu_over_bare": measured["tokens_per_cpu_s"] / reference["tokens_per_cpu_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="warm-started model folder")
    parser.add_argument("--slots", type=int, nargs="+", default=[32, 64], help="environments (default 32 64)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement, seconds")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rollouts.json"))
    arguments = parser.parse_args()
    rows = []
    for slots in arguments.slots:
        rows.append(asyncio.run(compare(arguments.model, slots, arguments.seconds, arguments.rounds)))
        print(json.dumps(rows[-1], indent=1), flush=True)
    record(arguments.out, {"rows": rows})


if __name__ == "__main__":
    main()
