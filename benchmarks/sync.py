"""Time from the learner's new weights to their first sampled token, and where it goes.

    python -m benchmarks.sync [--sizes small large] [--out benchmarks/results/sync.json]

For two model sizes and every transport that runs on CPUs: publish in the learner, swap in a live policy server, sample
one token, and compare log-probabilities with the learner's as a run does after a swap. The reference, in the same run,
is one memory copy of as many bytes. The parts, of which every figure is the median:

    publish     the learner sums up its tensors, and writes or announces them
    register    the registry remembers the update
    pause       the engine comes to rest and drops what it cached
    prepare     vLLM puts every layer back into the form that its loader expects
    load        the engine reads or receives the tensors, sums them up and loads them
    process     vLLM packs every layer for its kernels again
    check       sums and what the layers hold are compared with what was published
    resume      the engine runs again
    call        the rest of the call to the server: Ray, the object store, the driver
    first_token a request of one token
    probe       the engine answers the prompts of a check, and the learner gives its log-probabilities of the answers
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.trajectory import TrajectoryBatch
from benchmarks.record import record
from cluster.run.sync_check import PROMPTS

SIZES = {
    "small": {"hidden": 128, "layers": 2, "image_size": 64},
    "large": {"hidden": 1024, "layers": 8, "image_size": 64},
}
TRANSPORTS = ("shared_memory", "object_store", "gloo")
REPEATS = 5
#: Parts during which the engine stands still, and all of them, in order.
ENGINE_PARTS = ("pause", "prepare", "load", "process", "check", "resume")
PARTS = ("publish", "register", *ENGINE_PARTS, "call", "first_token", "probe")
#: Longest answer of a probe, tokens; as long as those of the demo.
PROBE_TOKENS = 64
#: Several colours, since vLLM treats an Idefics3 picture whose normalised pixels are all 0 as padding and fails.
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def make_model(folder: str, size: dict[str, int]) -> None:
    from learner.supervised.default_model import DefaultModelOptions, make_default_vlm

    make_default_vlm(
        folder,
        ['{"thoughts": "add", "action": "+"}', "Move to the target."],
        [PICTURE],
        DefaultModelOptions(**size),
    )


def copy_seconds(size: int) -> float:
    """Median time to copy `size` bytes in memory, seconds."""
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


async def measure(model: str, transport: str, run_folder: Path) -> dict[str, Any]:
    """Medians over `REPEATS` versions, seconds."""
    from actors.generation import GenerationRequest
    from actors.images import PngEncoder
    from cluster.config.files import load_config
    from cluster.launch.ray_runtime import ray_session
    from cluster.run.run_folder import Progress, RunFolder
    from cluster.run.system import System

    class Quiet:
        def stage(self, text: str) -> None: ...

    words = [
        f"model.path={model}",
        f"weight_sync.transport={transport}",
        "entropy.mode=none",
        "rollout.envs_per_worker=1",
        f"folder={run_folder}",
        f"name={transport}-{Path(model).name}",
        "mode=async",
        "cluster.object_store_bytes=2000000000",
    ]
    config = load_config(["configs/numberline.yaml"], words)
    run = RunFolder.create(config)
    image, png = PngEncoder().encode(PICTURE)
    with ray_session(config) as temporary:
        system = await System.start(config, run, Progress(), temporary, Quiet())
        try:
            (server,) = system.servers.values()
            request = GenerationRequest("Move to the target.", image, png, 0.0, 1)
            rows = [await measured_swap(system, server, request, version) for version in range(1, REPEATS + 2)]
        finally:
            await system.close()
            run.unlock()
    parts = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}  # the first one is warm-up
    still = sum(parts[name] for name in ENGINE_PARTS)
    swap = sum(parts[name] for name in ("publish", "register", "call")) + still
    return {
        "first_token_s": swap + parts["first_token"],
        "publish_and_swap_s": swap,
        "engine_stands_still_s": still,
        "parts_s": parts,
    }


async def measured_swap(system: Any, server: Any, request: Any, version: int) -> dict[str, float]:
    """One swap as `System.publish` makes it, the first token after it, and a check; seconds of every part."""
    parts: dict[str, float] = {}
    since = time.perf_counter()

    def part(name: str) -> None:
        nonlocal since
        before, since = since, time.perf_counter()
        parts[name] = since - before

    update = await asyncio.to_thread(system.learner.publish, version)
    part("publish")
    update = await system.registry.put.remote(update)
    part("register")
    (report,) = (await asyncio.to_thread(system._sync, update, 60.0)).values()
    part("call")
    answer = await server.generate.remote(request)
    part("first_token")
    assert answer.version_spans[0][0] == version
    probes = [replace(request, max_new_tokens=PROBE_TOKENS, temperature=1.0, seed=seed) for seed in range(PROMPTS)]
    answers = await server.generate_batch.remote(probes)
    rows = TrajectoryBatch.from_rows(
        [
            {"prompt": probe.prompt, "image": probe.image, "prompt_ids": made.prompt_ids}
            | {"response_ids": made.response_ids, "behaviour_logprobs": made.logprobs}
            for probe, made in zip(probes, answers, strict=True)
        ],
        {request.image: request.png},
    )
    await asyncio.to_thread(system.learner.token_logprobs, rows)
    part("probe")
    parts |= report.parts
    parts["call"] -= sum(report.parts.values())
    return {name: parts[name] for name in PARTS}


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of every part, one column per model and transport."""
    heads = [f"{row['model']}/{row['transport']}" for row in rows]
    lines = ["".join(f"{head:>22}" for head in ("ms", *heads))]
    for name in PARTS:
        lines.append(f"{name:>22}" + "".join(f"{1000 * row['parts_s'][name]:>22.1f}" for row in rows))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models (default all)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sync.json"))
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="coso-bench-") as folder:
        for name in arguments.sizes:
            size = SIZES[name]
            model = f"{folder}/{name}"
            make_model(model, size)
            size_bytes = (Path(model) / "model.safetensors").stat().st_size
            reference = copy_seconds(size_bytes)
            for transport in TRANSPORTS:
                row = asyncio.run(measure(model, transport, Path(folder) / "runs"))
                row = {
                    "model": name,
                    "bytes": size_bytes,
                    "transport": transport,
                    **row,
                    "copy_s": reference,
                    "times_a_copy": row["first_token_s"] / reference,
                }
                results.append(row)
                print(json.dumps(row), flush=True)
    print(table(results))
    record(arguments.out, {"rows": results})


if __name__ == "__main__":
    main()
