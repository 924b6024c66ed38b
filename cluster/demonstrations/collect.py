"""An environment's expert at play, in the trajectory schema: for warm starts, in memory or as a folder of Arrow shards.

A folder of demonstrations holds `batch_000000.parquet`, `images_000000.parquet` and so on, as a run's log of
trajectories does (token ids are null: they depend on a model), `state_labels_000000.parquet`, what is to be seen in the
picture of each step, and `demonstrations.yaml`, how they came about; written last, it makes the folder a whole one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from actors.rollouts.episode import training_seed
from actors.trajectory import PngEncoder, SchemaMismatch, TrajectoryBatch, TrajectoryLog, outcome_columns
from cluster.environments import make_environment
from cluster.errors import CosoError

SHARD_STEPS = 2000
ABOUT = "demonstrations.yaml"
_LABELS_SCHEMA = pa.schema([("state_labels", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class Play:
    """Whose play, and how: what `demonstrations.yaml` says.

    With probability `noise` an action is not the expert's, but `habit`, or uniformly random where that is empty.
    """

    environment: str
    kwargs: dict[str, Any]
    seed: int
    noise: float
    habit: str


@dataclass
class Demonstrations:
    """Steps of an expert: their rows and pictures, and state labels int32 (N, M), M as `state_label_sizes` is long."""

    batch: TrajectoryBatch
    state_labels: np.ndarray
    state_label_sizes: tuple[int, ...]


def demonstrate(
    play: Play, steps: int, shard_steps: int = SHARD_STEPS, advance: Callable[[], None] = lambda: None
) -> Iterator[Demonstrations]:
    """Let the environment's expert play exactly `steps` steps, on training seeds; the last episode may be cut short.

    Yields them `shard_steps` at a time. The same arguments give the same steps. Raises CosoError for an environment
    that cannot be made or has no expert, and for a habit that is no action of it.
    """
    environment = make_environment(play.environment, play.kwargs)
    game: Any = environment.unwrapped
    words = getattr(game, "action_words", ())
    try:
        if not hasattr(game, "expert_utterance"):
            raise CosoError(f"there is nothing to learn from: {play.environment} has no expert_utterance")
        if play.habit and words and play.habit not in words:
            raise CosoError(f"habit {play.habit!r} is no action of {play.environment}: {', '.join(words)}")
        sizes = tuple(getattr(game, "state_label_sizes", ()))
        rng = np.random.default_rng([play.seed, 1])
        encoder = PngEncoder()
        rows: list[dict[str, Any]] = []
        images: dict[str, bytes] = {}
        labels: list[np.ndarray] = []
        episode = 0
        over = True
        for count in range(1, steps + 1):
            if over:
                episode += 1
                step = 0
                seed = training_seed(play.seed, 0, episode)
                observation, _ = environment.reset(seed=seed)
            image, png = encoder.encode(observation["image"])
            images[image] = png
            labels.append(game.state_labels() if sizes else np.empty(0, np.int32))
            try:
                utterance = game.expert_utterance(rng, play.noise, play.habit)
            except NotImplementedError as error:
                raise CosoError(f"there is nothing to learn from: {error}") from None
            prompt = observation["prompt"]
            observation, reward, terminated, truncated, info = environment.step(utterance)
            over = terminated or truncated
            rows.append(
                {
                    "run": "demonstrations",
                    "episode": f"{play.seed}-{episode}",
                    "environment": play.environment,
                    "step": step,
                    "seed": seed,
                    "prompt": prompt,
                    "image": image,
                    "utterance": utterance,
                    **outcome_columns(float(reward), terminated, truncated, info),
                }
            )
            step += 1
            advance()
            if len(rows) == shard_steps or count == steps:
                yield Demonstrations(TrajectoryBatch.from_rows(rows, images), np.stack(labels), sizes)
                rows, images, labels = [], {}, []
    finally:
        environment.close()


def gather(shards: Iterator[Demonstrations]) -> Demonstrations:
    """All shards as one."""
    everything = list(shards)
    return Demonstrations(
        TrajectoryBatch.concatenate(shard.batch for shard in everything),
        np.concatenate([shard.state_labels for shard in everything]),
        everything[0].state_label_sizes,
    )


def write_demonstrations(play: Play, steps: int, folder: Path, shard_steps: int = SHARD_STEPS) -> float:
    """Write `steps` steps of the expert to a new folder, whole or not at all; returns the mean reward of a step.

    Raises CosoError where the folder exists, or as `demonstrate`.
    """
    from cluster.telemetry.progress import progress_bar

    if folder.exists():
        raise CosoError(f"{folder} exists; choose another folder, or remove it first")
    aside = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        log = TrajectoryLog(aside)
        total = 0.0
        with progress_bar(f"demonstrations of {play.environment}", steps) as advance:
            for index, shard in enumerate(demonstrate(play, steps, shard_steps, advance)):
                log.write(index, shard.batch)
                table = pa.table({"state_labels": shard.state_labels.tolist()}, schema=_LABELS_SCHEMA)
                pq.write_table(table, _labels_path(aside, index))
                total += float(shard.batch.column("reward").sum())
        about = {**asdict(play), "steps": steps, "state_label_sizes": list(shard.state_label_sizes)}
        (aside / ABOUT).write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")
        aside.rename(folder)
    except OSError as error:
        raise CosoError(f"demonstrations cannot be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return total / steps


def load_demonstrations(folder: Path, environment: str) -> Demonstrations:
    """What `write_demonstrations` wrote. Raises CosoError where it is none, or of another environment."""
    try:
        about = yaml.safe_load((folder / ABOUT).read_text(encoding="utf-8"))
        log = TrajectoryLog(folder)
        shards = log.updates()
        batch = TrajectoryBatch.concatenate(log.read(index) for index in shards)
        tables = [pq.read_table(_labels_path(folder, index), partitioning=None) for index in shards]
        labels = np.array(pa.concat_tables(tables)["state_labels"].to_pylist(), np.int32)
        shown, steps, sizes = about["environment"], about["steps"], tuple(about["state_label_sizes"])
    except FileNotFoundError as error:
        raise CosoError(
            f"{folder} is no folder of demonstrations: {error.filename} is not there; `coso demos` makes one"
        ) from None
    except (OSError, SchemaMismatch, pa.ArrowException, yaml.YAMLError, KeyError, TypeError) as error:
        raise CosoError(f"the demonstrations in {folder} cannot be read: {error}") from error
    if len(batch) != steps or len(labels) != steps:
        raise CosoError(f"{folder} should hold {steps} steps but holds {len(batch)}: make the demonstrations anew")
    if shown != environment:
        raise CosoError(f"{folder} shows {shown}, but environment.id is {environment}")
    return Demonstrations(batch, labels.reshape(steps, len(sizes)), sizes)


def _labels_path(folder: Path, index: int) -> Path:
    return folder / f"state_labels_{index:06d}.parquet"
