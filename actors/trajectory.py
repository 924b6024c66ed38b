"""The Arrow schema of a rollout: one row per environment step, images stored once by content hash.

Token-in, token-out: `prompt_ids` and `response_ids` are the ids that the engine saw and sampled. Nothing tokenises
text again; the learner trains on exactly these ids.

A `TrajectoryBatch` holds `steps` (a `pyarrow.Table` of `STEP_SCHEMA`) and `images` (content hash -> PNG bytes). Steps
refer to images by hash, so an image that a thousand steps show is stored once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.generation import RefusalReason

SCHEMA_VERSION = 2
#: Versions whose files can be read. Version 1 has no `action_start`, which is then null.
READABLE_SCHEMA_VERSIONS = frozenset({"1", str(SCHEMA_VERSION)})

#: Why an episode ended, in the `end_reason` of its last step ("" on every other step).
END_TERMINATED = "terminated"
END_TRUNCATED = "truncated"
END_ENVIRONMENT_DIED = "environment_died"
END_ENVIRONMENT_TIMEOUT = "environment_timeout"
END_ENVIRONMENT_ERROR = "environment_error"
INFRASTRUCTURE_END_REASONS = frozenset({END_ENVIRONMENT_DIED, END_ENVIRONMENT_TIMEOUT, END_ENVIRONMENT_ERROR})
#: The engine or the model's processor did not take what the environment showed; see `actors.generation.Refusal`.
REFUSAL_END_REASONS = frozenset(get_args(RefusalReason))
#: Ends that say nothing about how well the policy played.
FAILED_END_REASONS = INFRASTRUCTURE_END_REASONS | REFUSAL_END_REASONS

VERSION_SPAN = pa.struct([("version", pa.int32()), ("start", pa.int32())])

STEP_SCHEMA = pa.schema(
    [
        # --- identity
        ("run", pa.string()),
        ("episode", pa.string()),  # unique in a run
        ("environment", pa.string()),  # gymnasium id
        ("worker", pa.int32()),
        ("slot", pa.int32()),  # which of the worker's environments
        ("step", pa.int32()),  # 0-based within the episode
        ("seed", pa.int64()),  # what reset() was given
        # --- what the policy saw and said
        ("prompt", pa.string()),  # the environment's prompt text, before the chat template
        ("image", pa.string()),  # content hash into `images`
        ("prompt_ids", pa.list_(pa.int32())),  # (P,) as the engine saw them, image tokens expanded
        ("response_ids", pa.list_(pa.int32())),  # (n,) as sampled, end token included
        ("behaviour_logprobs", pa.list_(pa.float32())),  # (n,) nats, of the distribution sampled from
        ("policy_versions", pa.list_(VERSION_SPAN)),  # spans: from token `start` on, weights `version`
        ("finish_reason", pa.string()),  # stop | length
        ("utterance", pa.string()),
        # --- the outcome
        ("action", pa.string()),  # canonical text, "" if the utterance did not parse
        ("action_labels", pa.list_(pa.int32())),  # (K,), -1 where a head does not apply
        ("valid", pa.bool_()),
        # Position in the utterance of the first character of the action part; null where the environment does not say.
        ("action_start", pa.int32()),
        ("reward", pa.float32()),
        ("terminated", pa.bool_()),
        ("truncated", pa.bool_()),
        ("success", pa.bool_()),  # of the task, as of this step
        ("end_reason", pa.string()),
        # The observation after the last step of a truncated episode, to estimate the value of what would have followed.
        # If the environment failed: its last observation. If a request was refused: the last one that was not.
        # Null on every other step and where the episode terminated.
        ("final_prompt", pa.string()),
        ("final_prompt_ids", pa.list_(pa.int32())),
        ("final_image", pa.string()),
        # --- timings, seconds
        ("generate_seconds", pa.float32()),
        ("environment_seconds", pa.float32()),
        # --- written by the scoring pool: (n,) in [0, 1], null before scoring
        ("influence", pa.list_(pa.float32())),
    ],
    metadata={"coso.schema": "trajectory", "coso.schema_version": str(SCHEMA_VERSION)},
)

#: Columns without which a row is no step.
IDENTITY = ("episode", "step", "image")
IMAGE_SCHEMA = pa.schema([("hash", pa.string()), ("png", pa.binary())])


def outcome_columns(reward: float, terminated: bool, truncated: bool, info: dict[str, Any]) -> dict[str, Any]:
    """The columns from `action` to `end_reason`, filled with what an environment's `step` returned."""
    ended = END_TERMINATED if terminated else END_TRUNCATED if truncated else ""
    return {
        **{name: info[name] for name in ("action", "action_labels", "valid", "success")},
        "action_start": info.get("action_start"),
        "reward": reward,
        "terminated": terminated,
        "truncated": truncated,
        "end_reason": ended,
    }


class UnreadableTrajectory(ValueError):
    """A trajectory file is damaged, or not one of ours. The message names the file."""


class SchemaMismatch(UnreadableTrajectory):
    """A trajectory file has another schema version than this program reads."""


def _from_stream(buffer: pa.Buffer, images: dict[str, bytes]) -> TrajectoryBatch:
    return TrajectoryBatch(pa.ipc.open_stream(buffer).read_all(), images)


@dataclass
class TrajectoryBatch:
    """Steps and the images they refer to."""

    steps: pa.Table
    images: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Iterable[dict[str, Any]], images: dict[str, bytes]) -> TrajectoryBatch:
        """Rows with the fields of `STEP_SCHEMA`; a missing field is null."""
        return cls(pa.Table.from_pylist(list(rows), schema=STEP_SCHEMA), images)

    @classmethod
    def empty(cls) -> TrajectoryBatch:
        return cls(STEP_SCHEMA.empty_table())

    @classmethod
    def concatenate(cls, batches: Iterable[TrajectoryBatch]) -> TrajectoryBatch:
        batches = list(batches)
        if not batches:
            return cls.empty()
        images: dict[str, bytes] = {}
        for batch in batches:
            images.update(batch.images)
        return cls(pa.concat_tables([batch.steps for batch in batches]).combine_chunks(), images)

    def __len__(self) -> int:
        return self.steps.num_rows

    def __reduce__(self) -> tuple[Any, tuple[pa.Buffer, dict[str, bytes]]]:
        """Between processes, the table travels as one buffer of Arrow's own stream format. Pickled column by column, an
        episode takes twenty times as long."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.steps.schema) as writer:
            writer.write_table(self.steps)
        return _from_stream, (sink.getvalue(), self.images)

    @property
    def nbytes(self) -> int:
        """Bytes held: Arrow buffers and encoded images."""
        return self.steps.nbytes + sum(len(png) for png in self.images.values())

    @property
    def generated_tokens(self) -> int:
        return len(self.steps["response_ids"].combine_chunks().flatten())

    def ragged(self, column: str, dtype: Any) -> list[np.ndarray]:
        """A list column as one array per step; a null row becomes an empty array."""
        array = self.steps[column].combine_chunks()
        values = array.values.to_numpy(zero_copy_only=False)
        offsets = array.offsets.to_numpy()
        # A null row's offsets are equal, so its slice is empty, which is what is wanted.
        return [
            np.asarray(values[start:stop], dtype=dtype) for start, stop in zip(offsets[:-1], offsets[1:], strict=True)
        ]

    def column(self, name: str) -> np.ndarray:
        """A flat column as a NumPy array (object dtype for text)."""
        return self.steps[name].to_numpy()

    def behaviour_versions(self) -> np.ndarray:
        """int32 (steps,): the oldest policy version that made any token of the step."""
        spans = self.steps["policy_versions"].to_pylist()
        oldest = [min(span["version"] for span in row) if row else 0 for row in spans]
        return np.array(oldest, dtype=np.int32)

    def episode_slices(self) -> list[slice]:
        """One slice per episode; steps of an episode are adjacent and in order."""
        episodes = self.column("episode")
        if len(episodes) == 0:
            return []
        starts = [0, *(np.flatnonzero(episodes[1:] != episodes[:-1]) + 1).tolist(), len(episodes)]
        return [slice(start, stop) for start, stop in zip(starts[:-1], starts[1:], strict=True)]

    def with_influence(self, influence: list[np.ndarray]) -> TrajectoryBatch:
        """The same steps with the column `influence` filled: one float32 (n,) array per step, in order."""
        lengths = [len(ids) for ids in self.ragged("response_ids", np.int32)]
        if [len(weights) for weights in influence] != lengths:
            raise ValueError("influence must hold one weight for every response token of every step")
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = np.concatenate(influence).astype(np.float32) if influence else np.empty(0, np.float32)
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
        position = self.steps.schema.get_field_index("influence")
        return TrajectoryBatch(self.steps.set_column(position, STEP_SCHEMA.field("influence"), column), self.images)


class TrajectoryLog:
    """The record of every batch that was accepted for training: `trajectories/` of the run folder.

    `batch_000012.parquet` holds the steps of update 12, `images_000012.parquet` the images first seen there. Each file
    is written under another name and then renamed, so a crash cannot leave half a batch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._image_file_of: dict[str, Path] = {}
        for path in sorted(folder.glob("images_*.parquet")):
            for key in _read(path, IMAGE_SCHEMA, columns=["hash"])["hash"].to_pylist():
                self._image_file_of[key] = path

    def write(self, update: int, batch: TrajectoryBatch) -> int:
        """Write the batch of one update; returns the bytes written."""
        new = {key: png for key, png in batch.images.items() if key not in self._image_file_of}
        written = 0
        if new:
            path = self.folder / f"images_{update:06d}.parquet"
            table = pa.table({"hash": list(new), "png": list(new.values())}, schema=IMAGE_SCHEMA)
            if path.exists():  # a resume repeats the update: other batches may refer to the images already here
                table = pa.concat_tables([_read(path, IMAGE_SCHEMA), table])
            written += _write_whole(table, path, compression="none")
            self._image_file_of.update(dict.fromkeys(new, path))
        return written + _write_whole(batch.steps, self.batch_path(update), compression="zstd")

    def batch_path(self, update: int) -> Path:
        return self.folder / f"batch_{update:06d}.parquet"

    def updates(self) -> list[int]:
        """The updates whose batches are on disk, in order."""
        numbers = (path.stem.removeprefix("batch_") for path in self.folder.glob("batch_*.parquet"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def read(self, update: int) -> TrajectoryBatch:
        """The batch of one update with its images. Raises `UnreadableTrajectory`, `FileNotFoundError`."""
        path = self.batch_path(update)
        steps = _read(path)
        version = (steps.schema.metadata or {}).get(b"coso.schema_version", b"none").decode("utf-8", "replace")
        if version not in READABLE_SCHEMA_VERSIONS:
            raise SchemaMismatch(
                f"{path} has trajectory schema {version}; this program reads {SCHEMA_VERSION}. "
                "Read it with the version of coso-rl that wrote it."
            )
        if version != str(SCHEMA_VERSION):
            steps = steps.append_column("action_start", pa.nulls(len(steps), pa.int32()))
        steps = _as_schema(steps, STEP_SCHEMA, path)
        if missing := [name for name in IDENTITY if steps[name].null_count]:
            raise UnreadableTrajectory(f"{path} is damaged: steps without {', '.join(missing)}")
        wanted = set(steps["image"].to_pylist()) | set(steps["final_image"].to_pylist())
        return TrajectoryBatch(steps, self.read_images(wanted - {None}))

    def read_columns(self, update: int, columns: list[str]) -> pa.Table:
        """Some columns of the batch of one update. Raises as `read`."""
        return _read(self.batch_path(update), STEP_SCHEMA, columns=columns)

    def read_images(self, hashes: set[str]) -> dict[str, bytes]:
        """PNG bytes by content hash; hashes that the log does not hold are left out."""
        images: dict[str, bytes] = {}
        for path in sorted({self._image_file_of[key] for key in hashes if key in self._image_file_of}):
            table = _read(path, IMAGE_SCHEMA, filters=[("hash", "in", sorted(hashes))])
            images.update(zip(table["hash"].to_pylist(), table["png"].to_pylist(), strict=True))
        return images


def _read(path: Path, schema: pa.Schema | None = None, **options: Any) -> pa.Table:
    """A Parquet file, with the columns of `schema`. Raises `UnreadableTrajectory`, `FileNotFoundError`."""
    try:
        # partitioning=None: a folder named key=value above the run must not become a column.
        table = pq.read_table(path, partitioning=None, **options)
        # Lengths and offsets of a damaged file may point anywhere.
        table.validate(full=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreadableTrajectory(f"{path} is damaged: {first_line[:200]}") from error
    if schema is None:
        return table
    wanted = options.get("columns", schema.names)
    return _as_schema(table, pa.schema([schema.field(name) for name in wanted]), path)


def _as_schema(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
    """The table with just the columns of a schema. Raises `SchemaMismatch`."""
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise SchemaMismatch(
            f"{path} has other columns than trajectory schema {SCHEMA_VERSION}: {first_line[:200]}"
        ) from error


def _write_whole(table: pa.Table, path: Path, compression: str) -> int:
    """Write a Parquet file that appears whole or not at all; returns its size in bytes."""
    unfinished = path.with_suffix(".tmp")
    unfinished.unlink(missing_ok=True)  # it may be a link, in a folder of somebody else
    try:
        pq.write_table(table, unfinished, compression=compression)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path.stat().st_size
