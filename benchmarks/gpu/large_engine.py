"""A policy server with a vision-language model of 2 billion weights on one GPU: tokens, images, and swaps of weights.

    python -m benchmarks.gpu.large_engine [--height 720] [--width 1280]

Random weights (`large_model`) in bf16, random screens, 64 requests in flight. The swap is that of all weights through
shared memory while answers are under way; `swap_over_copy` compares it with the time that the same bytes take from
pinned memory to the GPU.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from actors.settings import ModelSettings, PolicyServerSettings
from benchmarks.gpu.card import arguments, finish, in_process, print_table, seconds
from benchmarks.gpu.large_model import make_model
from benchmarks.gpu.server import launched, shut_down
from benchmarks.gpu.steps import made_picture

ANSWER_TOKENS, IN_FLIGHT, SECONDS = 128, 64, 8.0
#: Room for more than 64 sequences of 2,048 tokens, bytes.
KV_CACHE = 6 << 30


def served(model: str, device: str, work: str, height: int, width: int) -> dict[str, Any]:
    policy = ModelSettings(path=model, dtype="bfloat16")
    settings = PolicyServerSettings(
        device=device,
        max_model_len=2048,
        gpu_memory_utilization=0.3,
        kv_cache_bytes=KV_CACHE if device == "cuda" else None,
    )
    return asyncio.run(answered(policy, settings, launched(policy, settings), Path(work), height, width))


async def answered(policy: Any, settings: Any, launch: Any, work: Path, height: int, width: int) -> dict[str, Any]:
    import numpy as np
    from safetensors import safe_open

    from actors.generation import GenerationRequest
    from actors.images import encode_png, image_hash
    from actors.serving.policy_server import PolicyServer
    from benchmarks.gpu.steps import PROMPT
    from learner.publish import SharedMemoryPublisher

    rng = np.random.default_rng(3)
    pictures = [made_picture(rng, height, width) for _ in range(2 * IN_FLIGHT)]
    shown = [(image_hash(picture), encode_png(picture)) for picture in pictures]
    begun = time.monotonic()
    server = PolicyServer(policy, settings, launch)
    await server.ready()
    figures: dict[str, Any] = {"start_s": time.monotonic() - begun}

    async def ask(number: int, tokens: int) -> int:
        image, png = shown[number % len(shown)]
        answer = await server.generate(GenerationRequest(PROMPT, image, png, 1.0, tokens, number))
        return len(answer.response_ids)

    await asyncio.gather(*(ask(number, 1) for number in range(IN_FLIGHT)))
    begun = time.monotonic()
    await asyncio.gather(*(ask(IN_FLIGHT + number, 1) for number in range(IN_FLIGHT)))
    figures["new_images_per_s"] = IN_FLIGHT / (time.monotonic() - begun)
    tokens, over = 0, False

    async def slot(number: int) -> None:
        nonlocal tokens
        while not over:
            tokens += await ask(number, ANSWER_TOKENS)
            number += IN_FLIGHT

    running = [asyncio.create_task(slot(number)) for number in range(IN_FLIGHT)]
    await asyncio.sleep(4.0)
    before, begun = tokens, time.monotonic()
    await asyncio.sleep(SECONDS)
    figures["tokens_per_s"] = (tokens - before) / (time.monotonic() - begun)
    publisher = SharedMemoryPublisher(f"gpu-large-engine-{os.getpid()}", work)
    with safe_open(f"{policy.path}/model.safetensors", "pt") as file:
        update = publisher.publish(1, ((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118
    reports = [await server.load(update) for _ in range(2)]
    figures |= {"swap_s": reports[-1].seconds, "swap_parts_s": dict(reports[-1].parts)}
    over = True
    await asyncio.gather(*running)
    shut_down(server)
    figures["published_gib"] = os.path.getsize(str(update.path)) / 2**30
    publisher.close()
    return figures


def copy_seconds(device: str, gib: float) -> float:
    """How long so many bytes take from pinned memory to the GPU."""
    import torch

    host = torch.empty(int(min(gib, 1.0) * 2**30), dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.empty_like(host, device=device, pin_memory=False)
    times = [seconds(device, lambda: there.copy_(host, non_blocking=True)) for _ in range(3)]
    return statistics.median(times) * gib / min(gib, 1.0)


def main() -> None:
    settings = arguments(__doc__, height=720, width=1280, model="")
    with tempfile.TemporaryDirectory() as work:
        model = settings.model or f"{work}/model"
        if not os.path.exists(model):
            in_process(make_model, model, settings.device)
        figures = in_process(served, model, settings.device, work, settings.height, settings.width)
    copy = in_process(copy_seconds, settings.device, figures["published_gib"])
    figures |= {"copy_s": copy, "swap_over_copy": figures["swap_s"] / copy}
    print_table("2 billion weights served", [{k: v for k, v in figures.items() if not isinstance(v, dict)}])
    finish("large_engine", settings, {"screen": [settings.height, settings.width], **figures})


if __name__ == "__main__":
    main()
