"""An update of a vision-language model of 2 billion weights on one GPU: time, memory, and what becomes of the FLOPs.

    python -m benchmarks.gpu.large_learner [--steps 32] [--height 720] [--width 1280]

Random weights (`large_model`), random screens, answers of 128 tokens; bf16 with AdamW in float32, activations
recomputed, one epoch of two minibatches. The second update is measured, with its images processed beforehand.

    model FLOPs use   6 · weights · tokens for the training passes and 2 · weights · tokens for the pass before them
                      (text and vision each with its own weights and tokens), over the time and the card's dense bf16
                      rate. Recomputed activations do not count.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.card import arguments, card, finish, forget_peak, in_process, peak_gib, print_table, seconds
from benchmarks.gpu.large_model import make_model
from benchmarks.lone_rank import started_alone

#: Dense bf16 rate of the cards whose data sheets we know, FLOP/s.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
ANSWER_TOKENS = 128


def trained(model: str, device: str, work: str, steps: int, height: int, width: int) -> dict[str, Any]:
    from actors.chat import ChatProcessor
    from actors.settings import ModelSettings
    from benchmarks.gpu.steps import made_steps
    from learner.algorithms.ppo import PpoSettings
    from learner.settings import EntropySettings, LearnerSettings
    from learner.setup import LearnerSetup, PublishTarget

    weights = make_model(model, device)
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
    forget_peak(device)
    begun = time.perf_counter()
    rank = started_alone(setup)
    figures: dict[str, Any] = {"start_s": time.perf_counter() - begun, "held_gib": peak_gib(device)}
    rank.update(batches[0], 0)
    begun = time.perf_counter()
    rank.prepare(batches[1].images)
    figures["images_per_s"] = steps / (time.perf_counter() - begun)
    figures["update_s"] = seconds(device, lambda: rank.update(batches[1], 1))
    figures["evaluation_s"] = seconds(device, lambda: rank.token_logprobs(batches[1]))
    figures["peak_gib"] = peak_gib(device)
    updates = []
    for version in (1, 2):
        figures["publish_s"] = seconds(device, lambda version=version: updates.append(rank.publish(version)))
    figures["published_gib"] = os.path.getsize(updates[-1].path) / 2**30
    rank._publisher().close()
    prompt = batches[1].steps["prompt_ids"].to_pylist()[0]
    image_tokens = sum(token == rank.model.hf_model.config.image_token_id for token in prompt)
    return figures | {
        "weights": weights,
        "text_tokens": steps * (len(prompt) + ANSWER_TOKENS),
        "vision_tokens": steps * image_tokens * 4,  # patches, of which four become one token
        "prompt_tokens": len(prompt),
        "image_tokens": image_tokens,
    }


def main() -> None:
    settings = arguments(__doc__, steps=32, height=720, width=1280, model="")
    with tempfile.TemporaryDirectory() as work:
        figures = in_process(
            trained,
            settings.model or f"{work}/model",
            settings.device,
            work,
            settings.steps,
            settings.height,
            settings.width,
        )
    weights = figures.pop("weights")
    figures["model_flops"] = 8 * sum(weights[part] * figures[f"{part}_tokens"] for part in ("text", "vision"))
    known = in_process(card, settings.device).get("card", "")
    peak = next((rate for name, rate in PEAKS.items() if name in known), None)
    figures["model_flops_use"] = figures["model_flops"] / figures["update_s"] / peak if peak else None
    print_table("an update of 2 billion weights", [figures])
    finish(
        "large_learner",
        settings,
        {"weights": weights, "steps": settings.steps, "screen": [settings.height, settings.width], **figures},
    )


if __name__ == "__main__":
    main()
