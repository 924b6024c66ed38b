"""Time from the learner's new weights to their first sampled token, compared with a memory copy of the same size.

    python -m benchmarks.sync [--out benchmarks/results/sync.json]

For two model sizes and every transport that runs on CPUs: publish in the learner, swap in a live policy server, sample
one token. The reference, in the same run, is one memory copy of as many bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record

SIZES = {
    "small": {"hidden": 128, "layers": 2, "image_size": 64},
    "large": {"hidden": 1024, "layers": 8, "image_size": 64},
}
TRANSPORTS = ("shared_memory", "object_store", "gloo")
REPEATS = 5
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
            rows = []
            for version in range(1, REPEATS + 2):
                begun = time.perf_counter()
                report = await system.publish(version)
                swapped = time.perf_counter()
                answer = await server.generate.remote(request)
                finished = time.perf_counter()
                assert answer.version_spans[0][0] == version
                rows.append((finished - begun, swapped - begun, report["time/swap"]))
            rows = rows[1:]  # the first one is warm-up
        finally:
            await system.close()
            run.unlock()
    total, publish, swap = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"first_token_s": total, "publish_and_swap_s": publish, "engine_stands_still_s": swap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sync.json"))
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="coso-bench-") as folder:
        for name, size in SIZES.items():
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
    record(arguments.out, {"rows": results})


if __name__ == "__main__":
    main()
