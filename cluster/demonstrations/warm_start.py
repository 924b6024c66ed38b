"""Warm start: teach a model the answer format by supervised fine-tuning on an expert's demonstrations.

By default this makes a new small VLM with its own tokenizer. With `warm_start.make_model: false` it fine-tunes the
model at `model.path`. Training uses the same DeepSpeed learner as reinforcement learning.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from actors.images import decode_png
from actors.trajectory import STEP_SCHEMA, TrajectoryBatch, TrajectoryLog
from cluster.config.paths import absolute_paths
from cluster.config.run_config import RunConfig
from cluster.demonstrations.collect import Demonstrations, Play, demonstrate, gather, load_demonstrations
from cluster.errors import CosoError
from cluster.replacing import replaced_folder
from cluster.telemetry.progress import progress_bar, spinner

if TYPE_CHECKING:
    from actors.chat import ChatProcessor
    from learner.setup import LearnerSetup

#: Subfolder of a model folder with its demonstrations; the SCM is pre-trained on them.
DEMONSTRATIONS = "demonstrations"
#: Optimizer steps between two updates of the progress bar.
STEPS_PER_CALL = 10
#: AdamW as it suits fitting a model from scratch; the run's own settings are for the small steps of reinforcement
#: learning.
ADAMW = {"betas": (0.9, 0.98), "epsilon": 1e-8, "weight_decay": 0.01, "gradient_clip": 1.0}


def warm_start(config: RunConfig, overwrite: bool = False) -> Path:
    """Write the warm-started model to `warm_start.output` and return its path. Raises `CosoError`."""
    from cluster.launch.ray_runtime import ray_session

    config = absolute_paths(config)
    settings = config.warm_start
    output = Path(settings.output)
    if not settings.make_model:
        _require_start_model(config.model.path)
    with replaced_folder(output, "model folder", "config.json", overwrite) as model:
        shown = demonstrations(config)
        start = config.model.path
        with ray_session(config), tempfile.TemporaryDirectory(dir=model.parent, prefix=f".{output.name}-") as initial:
            if settings.make_model:
                start = initial
                _make_model(config, shown, start)
            _fine_tune(config, shown, start, model)
    return output


def _require_start_model(path: str) -> None:
    """Raise `CosoError` for a model that cannot be fine-tuned, before demonstrations are collected."""
    from actors.chat import NotAVisionLanguageModel
    from actors.model_folder import read_model

    try:
        read_model(path, trained=True)
    except NotAVisionLanguageModel as error:
        raise CosoError(str(error)) from None


def demonstrations(config: RunConfig) -> Demonstrations:
    """The demonstrations in `warm_start.demonstrations_from`, or newly collected ones. Raises `CosoError`."""
    settings = config.warm_start
    if settings.demonstrations_from:
        return load_demonstrations(Path(settings.demonstrations_from), config.environment.id)
    play = Play(config.environment.id, config.environment.kwargs, config.seed, settings.noise, settings.habit)
    with progress_bar("demonstrations", settings.demonstrations) as advance:
        return gather(demonstrate(play, settings.demonstrations, advance=advance))


def with_token_ids(shown: TrajectoryBatch, chat: ChatProcessor) -> TrajectoryBatch:
    """Add token ids to the demonstrations: this model's tokens of each utterance, then its end token."""
    ids = chat.tokenizer(shown.column("utterance").tolist(), add_special_tokens=False)["input_ids"]
    column = pa.array([[*each, *chat.eos_token_ids[:1]] for each in ids], STEP_SCHEMA.field("response_ids").type)
    position = STEP_SCHEMA.get_field_index("response_ids")
    return TrajectoryBatch(shown.steps.set_column(position, STEP_SCHEMA.field("response_ids"), column), shown.images)


def read_demonstrations(model_path: str) -> TrajectoryBatch | None:
    """The demonstrations in a warm-started model folder, or None if it has none."""
    folder = Path(model_path) / DEMONSTRATIONS
    if not (folder / "batch_000000.parquet").exists():
        return None
    return TrajectoryLog(folder).read(0)


def supervised_setup(config: RunConfig, start: str) -> LearnerSetup:
    """The learner of a warm start from the model at `start`.

    It learns what demonstrations say at temperature 1, whatever temperature answers are sampled at: at 0.5, a model
    would learn to be as unsure there as the demonstrations are, and its logits would be half as large.
    """
    from cluster.launch.learner import learner_setup

    changes = ADAMW | ({"lora": None} if config.warm_start.make_model else {})
    return replace(
        learner_setup(config),
        temperature=1.0,
        model=config.model.model_copy(update={"path": start}),
        learner=config.learner.model_copy(update=changes),
    )


def _make_model(config: RunConfig, shown: Demonstrations, folder: str) -> None:
    """Make the small model and pre-train its vision tower, in a separate process."""
    import ray

    with spinner(
        "making a model and pre-training its vision tower" if config.warm_start.vision_steps else "making a model"
    ):
        ray.get(
            ray.remote(num_cpus=1)(_make_and_pretrain).remote(config, shown, folder),
            timeout=config.learner.start_deadline_s,
        )


def _make_and_pretrain(config: RunConfig, shown: Demonstrations, folder: str) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    from actors.chat import ChatProcessor
    from learner.supervised.default_model import DefaultModelOptions, make_default_vlm
    from learner.supervised.vision_pretraining import pretrain_vision

    torch.set_num_threads(config.learner.threads)
    settings = config.warm_start
    prompts, keys = shown.batch.column("prompt").tolist(), shown.batch.column("image").tolist()
    texts = [text for pair in zip(prompts, shown.batch.column("utterance").tolist(), strict=True) for text in pair]
    pictures = {key: step for step, key in enumerate(keys)}  # each picture once, at the last step that shows it
    images = [decode_png(shown.batch.images[key]) for key in pictures]
    options = DefaultModelOptions(hidden=settings.hidden, layers=settings.layers, image_size=settings.image_size)
    make_default_vlm(folder, texts, [np.asarray(image) for image in images[:64]], options, seed=config.seed)
    if not settings.vision_steps or not shown.state_label_sizes:
        return
    chat = ChatProcessor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    pretrain_vision(
        model,
        [chat.encode_prompt(prompts[step], image) for step, image in zip(pictures.values(), images, strict=True)],
        shown.state_labels[list(pictures.values())],
        shown.state_label_sizes,
        steps=settings.vision_steps,
        learning_rate=settings.vision_learning_rate,
        seed=config.seed,
    )
    model.save_pretrained(folder)


def _fine_tune(config: RunConfig, shown: Demonstrations, start: str, model: Path) -> None:
    """Fine-tune the model at `start`; writes a complete model folder to `model`."""
    from actors.chat import ChatProcessor
    from cluster.launch.learner import start_learner
    from cluster.launch.reservation import reserve
    from learner.group import LearnerFailed

    chat = ChatProcessor(start)
    batch = with_token_ids(shown.batch, chat)
    steps = config.warm_start.steps
    setup = supervised_setup(config, start)
    try:
        learner = start_learner(config, setup, reserve(config, "learner rank").ranks_group)
        try:
            with progress_bar("fine-tuning", steps) as advance:
                learner.begin_supervised(batch, config.warm_start)
                for done in range(0, steps, STEPS_PER_CALL):
                    reports = learner.supervised_steps(min(STEPS_PER_CALL, steps - done))
                    advance(len(reports), f"{reports[-1]['nll']:.3f} nats per token")
            learner.save_model(model)
        finally:
            learner.close()
    except LearnerFailed as error:
        raise CosoError(f"fine-tuning failed: {error}") from error
    TrajectoryLog(model / DEMONSTRATIONS).write(0, batch)
