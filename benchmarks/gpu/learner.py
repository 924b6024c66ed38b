"""One update on CUDA and on the CPU, by precision, ZeRO stage and adapters: do they agree, and does a resume?

    python -m benchmarks.gpu.learner

Each case is one rank with the tiny default model: log-probabilities of 18 steps, an update of several micro-batches,
the weights published, a checkpoint written and loaded again. Both devices begin with the same weights. Columns:

    logprobs apart        |log-probability on this device - float32 on the CPU|, the largest, before the update (nats)
    moved                 the largest change of a log-probability by the update
    moved apart           the same change on the two devices in the same precision, the largest difference
    norm                  gradient norm before clipping, mean over optimizer steps
    after resume          the largest difference after the checkpoint was loaded: 0 if nothing was lost
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.card import arguments, finish, forget_peak, in_process, peak_gib, print_table
from benchmarks.lone_rank import started_alone

#: (precision, ZeRO stage, adapters)
CASES = [("float32", stage, False) for stage in range(4)]
CASES += [("bfloat16", stage, False) for stage in range(4)]
CASES += [("float32", 0, True), ("bfloat16", 0, True), ("bfloat16", 2, True), ("bfloat16", 3, True)]


def name_of(dtype: str, stage: int, adapters: bool) -> str:
    return f"{dtype} ZeRO {stage}{' LoRA' * adapters}"


def make_model(folder: str) -> None:
    import numpy as np

    from benchmarks.gpu.steps import PROMPT
    from learner.supervised.default_model import DefaultModelOptions, make_default_vlm

    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    make_default_vlm(
        folder, [PROMPT, '{"action": "+"}'], [picture], DefaultModelOptions(hidden=128, layers=2, image_size=64)
    )


def measured(model: str, device: str, work: str) -> dict[str, dict[str, Any]]:
    """Every case on one device: figures and log-probabilities, or what it failed with."""
    found = {}
    for case in CASES:
        try:
            found[name_of(*case)] = one_case(model, device, Path(work), *case)
        except Exception as error:
            found[name_of(*case)] = {"failed": f"{type(error).__name__}: {error}"}
    return found


def one_case(model: str, device: str, work: Path, dtype: str, stage: int, adapters: bool) -> dict[str, Any]:
    import numpy as np

    from actors.chat import ChatProcessor
    from actors.settings import ModelSettings
    from benchmarks.gpu.steps import made_steps
    from learner.algorithms.ppo import PpoSettings
    from learner.settings import EntropySettings, LearnerSettings, LoraSettings
    from learner.setup import LearnerSetup, PublishTarget

    learner = LearnerSettings(
        device=device,
        zero_stage=stage,
        lora=LoraSettings(rank=8, alpha=16.0, dropout=0.0) if adapters else None,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        epsilon=1e-5,
        gradient_clip=0.5,
        minibatch=9,
        micro_batch=3,
        token_chunk=50,
        gradient_checkpointing=stage == 2,
    )
    name = f"gpu-benchmark-{device}-{dtype}-{stage}-{adapters}".lower()
    setup = LearnerSetup(
        model=ModelSettings(path=model, dtype=dtype, value_hidden=(16,)),
        learner=learner,
        algorithm=PpoSettings(),
        entropy=EntropySettings(coefficient=0.05),
        temperature=1.0,
        total_updates=3,
        max_policy_lag=None,
        seed=1,
        publishing=PublishTarget(transport="shared_memory", run=name, fallback_folder=work),
    )
    forget_peak(device)
    rank = started_alone(setup)
    try:
        steps = made_steps(ChatProcessor(model), 18, height=64, width=64, answer_tokens=30)
        before = np.concatenate(rank.token_logprobs(steps))
        begun = time.perf_counter()
        metrics = rank.update(steps, 0)
        spent = time.perf_counter() - begun
        after = np.concatenate(rank.token_logprobs(steps))
        rank.publish(1)
        rank.save_checkpoint(work / name)
        rank.load_checkpoint(work / name)
        again = np.concatenate(rank.token_logprobs(steps))
    finally:
        rank._publisher().close()
    return {
        "before": before,
        "after": after,
        "norm": metrics["gradient_norm"],
        "after_resume": float(np.abs(again - after).max()),
        "seconds": spent,
        "peak_gib": peak_gib(device),
    }


def compared(here: dict[str, Any], on_cpu: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per case."""
    import numpy as np

    exact = on_cpu[name_of("float32", 0, False)]
    rows = []
    for name, found in here.items():
        if "failed" in found or "failed" in on_cpu[name]:
            text = found.get("failed") or f"on the CPU: {on_cpu[name]['failed']}"
            rows.append({"case": name, "failed": text})
            continue
        moved, moved_on_cpu = (each["after"] - each["before"] for each in (found, on_cpu[name]))
        rows.append(
            {
                "case": name,
                "logprobs_apart": float(np.abs(found["before"] - exact["before"]).max()),
                "moved": float(np.abs(moved).max()),
                "moved_apart": float(np.abs(moved - moved_on_cpu).max()),
                "norm": found["norm"],
                "norm_on_cpu": on_cpu[name]["norm"],
                "after_resume": found["after_resume"],
                "seconds": round(found["seconds"], 3),
                "peak_gib": found["peak_gib"],
            }
        )
    return rows


def main() -> None:
    settings = arguments(__doc__)
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(2) as both:
        model = f"{work}/model"
        in_process(make_model, model)
        devices = ["cpu"] if settings.device == "cpu" else ["cpu", "cuda"]
        running = [both.submit(in_process, measured, model, device, work) for device in devices]
        results = [each.result() for each in running]
    rows = compared(results[-1], results[0])
    failed = [row for row in rows if "failed" in row]
    if good := [row for row in rows if "failed" not in row]:
        print_table("an update on this device", good)
    finish("learner", settings, {"steps": 18, "cases": rows})
    if failed:
        raise SystemExit("\n".join(f"{row['case']}: {row['failed']}" for row in failed))


if __name__ == "__main__":
    main()
