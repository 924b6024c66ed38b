"""A model that knows the answer format: demonstrations by the environment's expert, then supervised fine-tuning.

By default a small VLM is made on the spot, with a tokenizer of its own; with `warm_start.make_model: false` the model
at `model.path` is fine-tuned instead. Training runs through the same DeepSpeed learner as reinforcement learning does.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.trajectory import PngEncoder, TrajectoryBatch, TrajectoryLog, decode_png
from cluster.config import RunConfig
from cluster.errors import CosoError

if TYPE_CHECKING:
    from actors.chat import ChatProcessor

#: Where a model folder keeps the demonstrations it was taught on; the SCM is pre-trained on them.
DEMONSTRATIONS = "demonstrations"
#: Optimizer steps between two movements of the progress bar.
STEPS_PER_CALL = 10


@dataclass
class Demonstration:
    """One step of the expert."""

    prompt: str
    image: str  # content hash
    utterance: str
    action: str
    action_labels: np.ndarray  # int32 (K,)
    state_labels: np.ndarray | None  # int32 (M,), what a reader must see in the picture


@dataclass
class Demonstrations:
    """What the expert showed, and the pictures it was shown on."""

    steps: list[Demonstration]
    images: dict[str, bytes]
    state_label_sizes: tuple[int, ...]


def warm_start(config: RunConfig, overwrite: bool = False) -> Path:
    """Write the warm-started model to `warm_start.output` and return its path. Raises `CosoError`."""
    from cluster.progress import progress_bar
    from cluster.ray_runtime import ray_session

    settings = config.warm_start
    output = Path(settings.output)
    if output.exists() and not overwrite:
        raise CosoError(f"model folder {output} exists; keep it, or replace it with --overwrite")
    aside = output.with_name(output.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        with progress_bar("demonstrations", settings.demonstrations) as advance:
            shown = demonstrate(config, advance)
        start = config.model.path
        with ray_session(config):
            if settings.make_model:
                start = str(aside / "initial")
                _make_model(config, shown, start)
            _fine_tune(config, shown, start, aside)
        if settings.make_model:
            shutil.rmtree(aside / "initial")
        if output.exists():
            shutil.rmtree(output)
        (aside / "model").rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return output


def demonstrate(config: RunConfig, advance: Any = lambda: None) -> Demonstrations:
    """Let the environment's expert play `warm_start.demonstrations` steps, on training seeds."""
    import gymnasium

    import envs
    from actors.episode import training_seed

    assert envs.NAMESPACE  # importing the package is what registers coso/...
    try:
        environment = gymnasium.make(config.environment.id, **config.environment.kwargs)
    except (gymnasium.error.Error, TypeError, ValueError, ImportError) as error:
        raise CosoError(f"environment.id {config.environment.id!r} cannot be made: {error}") from None
    game: Any = environment.unwrapped
    if not hasattr(game, "expert_utterance"):
        raise CosoError(f"{config.environment.id} has no expert (expert_utterance), so there is nothing to learn from")
    habit, words = config.warm_start.habit, getattr(game, "action_words", ())
    if habit and words and habit not in words:
        raise CosoError(f"warm_start.habit {habit!r} is no action of {config.environment.id}: {', '.join(words)}")
    rng = np.random.default_rng([config.seed, 1])
    encoder = PngEncoder()
    steps: list[Demonstration] = []
    images: dict[str, bytes] = {}
    episode = 0
    over = True
    while len(steps) < config.warm_start.demonstrations:
        if over:
            episode += 1
            observation, _ = environment.reset(seed=training_seed(config.seed, 0, episode))
        key, png = encoder.encode(observation["image"])
        images[key] = png
        try:
            utterance = game.expert_utterance(rng, config.warm_start.noise, config.warm_start.habit)
        except NotImplementedError as error:
            raise CosoError(f"there is nothing to learn from: {error}") from None
        seen = game.state_labels() if hasattr(game, "state_labels") else None
        prompt = observation["prompt"]
        observation, _, terminated, truncated, info = environment.step(utterance)
        over = terminated or truncated
        steps.append(Demonstration(prompt, key, utterance, info["action"], info["action_labels"], seen))
        advance()
    environment.close()
    return Demonstrations(steps, images, tuple(getattr(game, "state_label_sizes", ())))


def demonstration_batch(shown: Demonstrations, chat: ChatProcessor, config: RunConfig) -> TrajectoryBatch:
    """The demonstrations in the trajectory schema: the expert's text as the ids this model's tokenizer gives it."""
    rows = []
    for index, step in enumerate(shown.steps):
        ids = chat.tokenizer(step.utterance, add_special_tokens=False)["input_ids"] + chat.eos_token_ids[:1]
        rows.append(
            {
                "run": "demonstrations",
                "episode": str(index),
                "environment": config.environment.id,
                "step": 0,
                "prompt": step.prompt,
                "image": step.image,
                "response_ids": ids,
                "behaviour_logprobs": [0.0] * len(ids),
                "utterance": step.utterance,
                "action": step.action,
                "action_labels": step.action_labels,
                "valid": bool(step.action),
            }
        )
    return TrajectoryBatch.from_rows(rows, shown.images)


def read_demonstrations(model_path: str) -> TrajectoryBatch | None:
    """The demonstrations that a warm-started model folder carries, if it does."""
    folder = Path(model_path) / DEMONSTRATIONS
    if not (folder / "batch_000000.parquet").exists():
        return None
    return TrajectoryLog(folder).read(0)


def _make_model(config: RunConfig, shown: Demonstrations, folder: str) -> None:
    """Make the small model and pre-train its vision tower, in a process of their own."""
    import ray

    from cluster.progress import spinner

    pictures = {step.image: step for step in shown.steps}
    with spinner("making a model and teaching it to see" if config.warm_start.vision_steps else "making a model"):
        ray.get(
            ray.remote(num_cpus=1)(_make_and_pretrain).remote(
                config,
                [text for step in shown.steps for text in (step.prompt, step.utterance)],
                list(pictures.values()),
                shown,
                folder,
            ),
            timeout=config.learner.start_deadline_s,
        )


def _make_and_pretrain(
    config: RunConfig, texts: list[str], pictures: list[Demonstration], shown: Demonstrations, folder: str
) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    from actors.chat import ChatProcessor
    from learner.default_model import DefaultModelOptions, make_default_vlm
    from learner.vision_pretraining import pretrain_vision

    torch.set_num_threads(config.learner.threads)
    settings = config.warm_start
    images = [decode_png(shown.images[step.image]) for step in pictures]
    options = DefaultModelOptions(hidden=settings.hidden, layers=settings.layers, image_size=settings.image_size)
    make_default_vlm(folder, texts, [np.asarray(image) for image in images[:64]], options, seed=config.seed)
    if not settings.vision_steps or not shown.state_label_sizes:
        return
    chat = ChatProcessor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    pretrain_vision(
        model,
        [chat.encode_prompt(step.prompt, image) for step, image in zip(pictures, images, strict=True)],
        np.stack([step.state_labels for step in pictures if step.state_labels is not None]),
        shown.state_label_sizes,
        steps=settings.vision_steps,
        learning_rate=settings.vision_learning_rate,
        seed=config.seed,
    )
    model.save_pretrained(folder)


def _fine_tune(config: RunConfig, shown: Demonstrations, start: str, aside: Path) -> None:
    """Supervised fine-tuning of the model at `start`; leaves a whole model folder at `aside / "model"`."""
    from actors.chat import ChatProcessor
    from cluster.mapping import rank_resources, supervised_options, warm_start_learner_options
    from cluster.progress import progress_bar
    from learner.group import LearnerFailed, LearnerGroup

    chat = ChatProcessor(start)
    batch = demonstration_batch(shown, chat, config)
    steps = config.warm_start.steps
    try:
        learner = LearnerGroup(warm_start_learner_options(config, start), config.learner.ranks, rank_resources(config))
        try:
            with progress_bar("fine-tuning", steps) as advance:
                learner.begin_supervised(batch, supervised_options(config))
                for done in range(0, steps, STEPS_PER_CALL):
                    reports = learner.supervised_steps(min(STEPS_PER_CALL, steps - done))
                    advance(len(reports), f"{reports[-1]['nll']:.3f} nats per token")
            learner.save_model(aside / "model")
        finally:
            learner.close()
    except LearnerFailed as error:
        raise CosoError(f"fine-tuning failed: {error}") from error
    TrajectoryLog(aside / "model" / DEMONSTRATIONS).write(0, batch)
