"""An expert's demonstrations in the trajectory schema, for warm starts: in memory or as a folder of Arrow shards.

A folder of demonstrations holds `batch_000000.parquet`, `images_000000.parquet` and so on, as a run's log of
trajectories does (token ids are null, because they depend on a model). `state_labels_000000.parquet` says what each
step's picture shows. `demonstrations.yaml` says how the demonstrations were made; it is written last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from actors.images import PngEncoder
from actors.rollouts.episode import training_seed
from actors.trajectory import TrajectoryBatch, TrajectoryLog, UnreadableTrajectory, outcome_columns
from cluster.environments import make_environment
from cluster.errors import CosoError
from cluster.replacing import replaced_folder

SHARD_STEPS = 2000
ABOUT = "demonstrations.yaml"
_LABELS_SCHEMA = pa.schema([("state_labels", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class Play:
    """Which environment and how its expert plays: the content of `demonstrations.yaml`.

    With probability `noise`, an action is `habit` instead of the expert's, or uniformly random if `habit` is empty.
    """

    environment: str
    kwargs: dict[str, Any]
    seed: int
    noise: float
    habit: str


@dataclass
class Demonstrations:
    """Steps of an expert: rows and pictures, and state labels int32 (N, M) with M = len(state_label_sizes)."""

    batch: TrajectoryBatch
    state_labels: np.ndarray
    state_label_sizes: tuple[int, ...]


def demonstrate(
    play: Play, steps: int, shard_steps: int = SHARD_STEPS, advance: Callable[[], None] = lambda: None
) -> Iterator[Demonstrations]:
    """Let the environment's expert play exactly `steps` steps on training seeds. The last episode may be incomplete.

    Yields `shard_steps` steps at a time. The same arguments give the same steps. Raises CosoError if the environment
    cannot be made or has no expert, or if the habit is not one of its actions.
    """
    environment = make_environment(play.environment, play.kwargs)
    game: Any = environment.unwrapped
    words = getattr(game, "action_words", ())
    try:
        if not hasattr(game, "expert_utterance"):
            raise CosoError(f"{play.environment} has no expert (it does not define expert_utterance)")
        if play.habit and words and play.habit not in words:
            raise CosoError(f"habit {play.habit!r} is not an action of {play.environment}: {', '.join(words)}")
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
                raise CosoError(f"no demonstrations can be made: {error}") from None
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
    """Join all shards into one."""
    everything = list(shards)
    return Demonstrations(
        TrajectoryBatch.concatenate(shard.batch for shard in everything),
        np.concatenate([shard.state_labels for shard in everything]),
        everything[0].state_label_sizes,
    )


def write_demonstrations(play: Play, steps: int, folder: Path, shard_steps: int = SHARD_STEPS) -> float:
    """Write `steps` steps of the expert to a new folder, atomically; returns the mean reward per step.

    Raises CosoError if the folder exists, and as `demonstrate` does.
    """
    from cluster.telemetry.progress import progress_bar

    total = 0.0
    try:
        with (
            replaced_folder(folder, "folder of demonstrations", ABOUT, overwrite=None) as aside,
            progress_bar(f"demonstrations of {play.environment}", steps) as advance,
        ):
            log = TrajectoryLog(aside)
            for index, shard in enumerate(demonstrate(play, steps, shard_steps, advance)):
                log.write(index, shard.batch)
                table = pa.table({"state_labels": shard.state_labels.tolist()}, schema=_LABELS_SCHEMA)
                pq.write_table(table, _labels_path(aside, index))
                total += float(shard.batch.column("reward").sum())
            about = {**asdict(play), "steps": steps, "state_label_sizes": list(shard.state_label_sizes)}
            (aside / ABOUT).write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise CosoError(f"demonstrations cannot be written to {folder}: {error}") from error
    return total / steps


def load_demonstrations(folder: Path, environment: str) -> Demonstrations:
    """Read what `write_demonstrations` wrote. Raises CosoError if it is incomplete or of another environment."""
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
            f"{folder} is not a folder of demonstrations: {error.filename} is missing; make one with `coso demos`"
        ) from None
    except (OSError, UnreadableTrajectory, pa.ArrowException, yaml.YAMLError, KeyError, TypeError) as error:
        raise CosoError(f"the demonstrations in {folder} cannot be read: {error}") from error
    if len(batch) != steps or len(labels) != steps:
        raise CosoError(f"{folder} should hold {steps} steps but holds {len(batch)}: make the demonstrations again")
    if shown != environment:
        raise CosoError(f"{folder} shows {shown}, but environment.id is {environment}")
    return Demonstrations(batch, labels.reshape(steps, len(sizes)), sizes)


def _labels_path(folder: Path, index: int) -> Path:
    return folder / f"state_labels_{index:06d}.parquet"
