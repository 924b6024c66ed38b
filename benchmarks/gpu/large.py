"""A vision-language model of 2 billion weights on one GPU: learner, engine, memory and the way between them.

    python -m benchmarks.gpu.large [--steps 64] [--height 720] [--width 1280]

The architecture is Qwen2.5-VL's, with the text model of its 2 B member; the weights are random and made on the spot,
with a tokenizer of the full 151,936 words, so nothing is downloaded. One update in bf16 with AdamW in float32, with
activations recomputed; then the weights are published, and an engine answers and swaps them in.

    model FLOPs use   6 · weights · tokens for the training passes and 2 · weights · tokens for the pass before them
                      (text and vision each with its own weights and tokens), over the time and the card's dense bf16
                      rate. Recomputed activations do not count.
    swap              against bytes / bandwidth: how long the same bytes take from pinned memory to the GPU
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.card import arguments, finish, forget_peak, in_process, peak_gib, print_table, seconds

#: Dense bf16 rate of the cards whose data sheets we know, FLOP/s.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
VOCABULARY = 151_936
TEXT = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "out_hidden_size": 1536,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
}
#: Of a rehearsal.
SMALL_TEXT = TEXT | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
}
SMALL_VISION = (
    VISION
    | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    | {
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
)
ANSWER_TOKENS, IN_FLIGHT, SECONDS = 128, 64, 8.0


def make_model(folder: str, device: str) -> dict[str, float]:
    """Write a random model with its processor; returns the numbers of weights."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    from tools.families.parts import ends, make_tokenizer, save_processor
    from tools.families.qwen import VISION_TOKENS, processor, vision_ids

    tokenizer = make_tokenizer(VISION_TOKENS, VOCABULARY, image_token="<|image_pad|>", video_token="<|video_pad|>")
    large = device == "cuda"
    config = Qwen2_5_VLConfig(
        text_config={
            **(TEXT if large else SMALL_TEXT),
            "vocab_size": VOCABULARY,
            **ends(tokenizer.get_vocab()),
            "bos_token_id": None,
        },
        vision_config=VISION if large else SMALL_VISION,
        tie_word_embeddings=True,
        **vision_ids(tokenizer),
    )
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    save_processor(
        Path(folder),
        processor(
            Qwen2_5_VLProcessor,
            tokenizer,
            "Qwen2VLVideoProcessor",
            patch_size=14,
            size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        ),
    )
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    return {"vision": counts["visual"], "text": counts["language_model"]}


# --- learner


def trained(model: str, device: str, work: str, steps: int, height: int, width: int) -> dict[str, Any]:
    import socket

    from actors.chat import ChatProcessor
    from actors.settings import ModelSettings
    from benchmarks.gpu.steps import made_steps
    from learner.algorithms.ppo import PpoSettings
    from learner.rank import LearnerRank
    from learner.settings import EntropySettings, LearnerSettings
    from learner.setup import LearnerSetup, PublishTarget

    setup = LearnerSetup(
        model=ModelSettings(path=model, dtype="bfloat16", value_hidden=(1024, 512)),
        learner=LearnerSettings(
            device=device,
            threads=min(8, len(os.sched_getaffinity(0))),
            minibatch=steps // 2,
            micro_batch=4,
            gradient_checkpointing=True,
            gradient_clip=1.0,
            learning_rate=1e-6,
        ),
        algorithm=PpoSettings(epochs=1),
        entropy=EntropySettings(coefficient=0.05, gradient_every=0),
        temperature=1.0,
        total_updates=10,
        max_policy_lag=None,
        seed=1,
        publishing=PublishTarget(
            transport="shared_memory", run=f"gpu-large-{os.path.basename(work)}", fallback_folder=Path(work)
        ),
    )
    batches = [
        made_steps(ChatProcessor(model), steps, height=height, width=width, answer_tokens=ANSWER_TOKENS, seed=seed)
        for seed in (0, 1)
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = LearnerRank(setup, 0, 1)
    forget_peak(device)
    begun = time.perf_counter()
    rank.start("127.0.0.1", port)
    figures: dict[str, Any] = {"start_s": time.perf_counter() - begun, "held_gib": peak_gib(device)}
    rank.update(batches[0], 0)
    begun = time.perf_counter()
    rank.prepare(batches[1].images)
    figures["images_per_s"] = steps / (time.perf_counter() - begun)
    parts = {"evaluation_s": 0.0}
    figures["update_s"] = seconds(device, lambda: rank.update(batches[1], 1))
    parts["evaluation_s"] = seconds(device, lambda: rank.token_logprobs(batches[1]))
    figures |= parts | {"peak_gib": peak_gib(device)}
    published: list[Any] = []
    for version in (1, 2):
        figures["publish_s"] = seconds(device, lambda version=version: published.append(rank.publish(version)))
    figures["published_gib"] = os.path.getsize(published[-1].path) / 2**30
    Path(work, "update.json").write_text(
        json.dumps({"path": published[-1].path, "checksums": dict(published[-1].checksums)})
    )
    prompt = batches[1].steps["prompt_ids"].to_pylist()[0]
    image_tokens = sum(token == rank.model.hf_model.config.image_token_id for token in prompt)
    return figures | {
        "text_tokens": steps * (len(prompt) + ANSWER_TOKENS),
        "vision_tokens": steps * image_tokens * 4,  # patches, of which four become one token
        "prompt_tokens": len(prompt),
        "image_tokens": image_tokens,
    }


# --- engine


def served(model: str, device: str, work: str, height: int, width: int) -> dict[str, Any]:
    from actors.serving.policy_engine import PolicyServerLaunch, policy_server_environment
    from actors.settings import ModelSettings, PolicyServerSettings

    policy = ModelSettings(path=model, dtype="bfloat16")
    settings = PolicyServerSettings(device=device, max_model_len=2048, gpu_memory_utilization=0.8)
    launch = PolicyServerLaunch(index=0, run_seed=1, temp_folder=tempfile.mkdtemp(prefix="v"))
    os.environ.update(policy_server_environment(policy, settings, launch))
    return asyncio.run(answered(policy, settings, launch, Path(work), height, width))


async def answered(policy: Any, settings: Any, launch: Any, work: Path, height: int, width: int) -> dict[str, Any]:
    import numpy as np

    from actors.generation import GenerationRequest
    from actors.images import encode_png, image_hash
    from actors.serving.policy_server import PolicyServer
    from actors.serving.weight_transfer import WeightUpdate
    from benchmarks.gpu.steps import PROMPT

    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(2 * IN_FLIGHT)]
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
    said = json.loads((work / "update.json").read_text())
    update = WeightUpdate(version=1, transport="shared_memory", path=said["path"], checksums=said["checksums"])
    reports = [await server.load(update) for _ in range(2)]
    figures |= {"swap_s": reports[-1].seconds, "swap_parts_s": dict(reports[-1].parts)}
    over = True
    await asyncio.gather(*running)
    server._engine.shutdown()
    os.unlink(said["path"])
    return figures


def copy_seconds(device: str, gib: float) -> float:
    """How long so many bytes take from pinned memory to the GPU."""
    import torch

    host = torch.empty(int(min(gib, 1.0) * 2**30), dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.empty_like(host, device=device, pin_memory=False)
    times = [seconds(device, lambda: there.copy_(host, non_blocking=True)) for _ in range(3)]
    return statistics.median(times) * gib / min(gib, 1.0)


def main() -> None:
    settings = arguments(__doc__, steps=64, height=720, width=1280)
    device, screen = settings.device, (settings.height, settings.width)
    with tempfile.TemporaryDirectory() as work:
        model = f"{work}/model"
        weights = in_process(make_model, model, device)
        learner = in_process(trained, model, device, work, settings.steps, *screen)
        engine = in_process(served, model, device, work, *screen)
        copy = in_process(copy_seconds, device, learner["published_gib"])
    flops = 2 * sum(weights[part] * learner[f"{part}_tokens"] for part in ("text", "vision"))
    learner["model_flops"] = 4 * flops  # 2 for the pass before and 6 for the training passes, in units of 2
    from benchmarks.gpu.card import card

    known = in_process(card, device).get("card", "")
    peak = next((rate for name, rate in PEAKS.items() if name in known), None)
    learner["model_flops_use"] = 4 * flops / learner["update_s"] / peak if peak else None
    engine["swap_over_copy"] = engine["swap_s"] / copy
    for name, part in (("learner", learner), ("engine", engine)):
        print_table(name, [{key: value for key, value in part.items() if not isinstance(value, dict)}])
    finish(
        "large",
        settings,
        {"weights": weights, "steps": settings.steps, "screen": list(screen), "learner": learner, "engine": engine}
        | {"copy_of_the_weights_s": copy},
    )


if __name__ == "__main__":
    main()
