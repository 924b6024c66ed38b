"""TRL's GRPO trainer on the one-step task, in an environment of its own; `benchmarks.peers` starts this.

    PYTHON -m benchmarks.peers_trl MODEL FOLDER --samples 192 --answers 8 --minibatch 64 --passes 1 --updates 6 …

Appends a line of JSON to FOLDER/marks.jsonl whenever all passes over what was generated together are done: the CPU
seconds of the process so far, by what they went to.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.one_step import ID, STATES, right_action


class TimedTrainer(GRPOTrainer):
    """The trainer as it is, with a clock at its stages."""

    cpu: Counter[str]

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        begun = time.process_time()
        try:
            yield
        finally:
            self.cpu[stage] += time.process_time() - begun

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock("generate"):
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock("generate and prepare"):
            return super()._generate_and_score_completions(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock("generate, prepare and learn"):
            return super().training_step(*args, **kwargs)


class Marks(TrainerCallback):
    """Notes the end of every round of generating and training."""

    def __init__(self, folder: Path, optimizer_steps: int) -> None:
        self.path = folder / "marks.jsonl"
        self.optimizer_steps = optimizer_steps
        self.trainer: TimedTrainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.optimizer_steps:
            return
        cpu = self.trainer.cpu
        prepared, whole = cpu["generate and prepare"], cpu["generate, prepare and learn"]
        line = {
            "generate": cpu["generate"],
            "prepare": prepared - cpu["generate"],  # pictures, prompts, rewards, old log-probabilities
            "learn": whole - prepared,  # forward and backward passes
            "all": time.process_time(),  # with the optimizer and the trainer's bookkeeping
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def dataset() -> Dataset:
    """One row per picture, with the action that is right there."""
    environment = gymnasium.make(ID)
    rows = []
    for state in STATES:
        seen, _ = environment.reset(options={"state": state})
        prompt = [{"role": "user", "content": seen["prompt"]}]
        rows.append({"prompt": prompt, "image": Image.fromarray(seen["image"]), "right": right_action(state)})
    return Dataset.from_list(rows)


def reward(completions: list[Any], right: list[str], **_: Any) -> list[float]:
    """1 where our parser reads the right action."""
    parser = gymnasium.make(ID).unwrapped.parser  # type: ignore[attr-defined]
    texts = (completion[0]["content"] for completion in completions)
    return [float(parser.parse(text).action == wanted) for text, wanted in zip(texts, right, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    for name in ("samples", "answers", "minibatch", "passes", "updates", "max-new-tokens", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    minibatches = arguments.samples // arguments.minibatch
    optimizer_steps = minibatches * arguments.passes
    config = GRPOConfig(
        output_dir=str(arguments.folder / "out"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=arguments.minibatch,
        steps_per_generation=minibatches,
        num_generations=arguments.answers,
        num_iterations=arguments.passes,
        max_completion_length=arguments.max_new_tokens,
        temperature=1.0,
        learning_rate=arguments.learning_rate,
        max_steps=optimizer_steps * arguments.updates,
        save_strategy="no",
        logging_steps=optimizer_steps,
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    marks = Marks(arguments.folder, optimizer_steps)
    trainer = TimedTrainer(
        model=AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.float32),
        processing_class=AutoProcessor.from_pretrained(arguments.model),
        reward_funcs=reward,
        args=config,
        train_dataset=dataset(),
        callbacks=[marks],
    )
    trainer.cpu = Counter()
    marks.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main()
