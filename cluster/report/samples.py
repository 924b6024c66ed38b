"""Sample episodes for the report: one success and one failure each from the first and the last update."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from actors.images import decode_png
from actors.trajectory import FAILED_END_REASONS, TrajectoryBatch, TrajectoryLog, UnreadableTrajectory
from envs.png import UnreadableImage
from scoring.pictures import shade_html
from scoring.profiles import position_profile

if TYPE_CHECKING:
    from actors.chat import ChatProcessor

#: Longest side of a screenshot in the report, pixels; larger ones are scaled down.
PICTURE_SIDE = 480
#: Largest number of steps shown of an episode.
STEPS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class SampleStep:
    """One step, ready for the page. picture: a data URI, or None if the log lacks it. answer: escaped HTML."""

    number: int
    picture: str | None
    answer: str
    action: str
    valid: bool
    reward: float


@dataclass(frozen=True, slots=True)
class SampleEpisode:
    """One episode. steps: its first steps; length: its number of steps."""

    update: int
    success: bool
    episode_return: float
    end_reason: str
    prompt: str
    length: int
    steps: tuple[SampleStep, ...]


def sample_episodes(folder: Path, chat: ChatProcessor | None) -> tuple[list[SampleEpisode], list[str]]:
    """Samples from a run's trajectory log, and the reason for each update that cannot be read; none without a log.

    chat: the model's tokenizer, for the text of single tokens; without it answers are not shaded.
    """
    samples: list[SampleEpisode] = []
    unread: list[str] = []
    try:
        log = TrajectoryLog(folder) if folder.is_dir() else None
    except UnreadableTrajectory as error:
        return [], [str(error)]
    updates = log.updates() if log is not None else []
    for update in sorted({updates[0], updates[-1]}) if updates else []:
        assert log is not None
        try:
            batch = log.read(update)
        except UnreadableTrajectory as error:
            unread.append(str(error))
            continue
        for wanted in (True, False):
            piece = choose_episode(batch, wanted)
            if piece is not None:
                samples.append(_episode(batch, piece, update, chat))
    return samples, unread


def influence_profiles(folder: Path) -> dict[int, np.ndarray]:
    """Mean influence by position (bins,) at the first and the last logged update, if the update measured influence.

    An update that cannot be read has none; `sample_episodes` says why."""
    try:
        log = TrajectoryLog(folder) if folder.is_dir() else None
    except UnreadableTrajectory:
        return {}
    updates = log.updates() if log is not None else []
    profiles = {}
    for update in sorted({updates[0], updates[-1]}) if updates else []:
        assert log is not None
        try:
            table = log.read_columns(update, ["influence"])  # the pictures of a batch can be large
        except UnreadableTrajectory:
            continue
        values = [np.array(row or [], np.float32) for row in table["influence"].to_pylist()]
        if any(value.any() for value in values):
            profiles[update] = position_profile(values)[0]
    return profiles


def choose_episode(batch: TrajectoryBatch, success: bool) -> slice | None:
    """The first episode with that outcome (success: return > 0) that fits on the page, else the shortest one.

    Episodes that a failed environment cut off do not count.
    """
    rewards, ends = batch.column("reward"), batch.column("end_reason")
    fitting = [
        piece
        for piece in batch.episode_slices()
        if ends[piece.stop - 1] not in FAILED_END_REASONS and (float(rewards[piece].sum()) > 0) == success
    ]
    readable = [piece for piece in fitting if 2 <= piece.stop - piece.start <= STEPS_SHOWN]
    return readable[0] if readable else min(fitting, key=lambda piece: piece.stop - piece.start, default=None)


def shaded_answer(row: dict[str, Any], chat: ChatProcessor | None) -> str:
    """A step's answer as escaped HTML; tokens are shaded by influence if it was measured."""
    ids, influence = row["response_ids"], row["influence"]
    if chat is None or not ids:
        return shade_html([row["utterance"] or ""], [0.0])
    if influence is None or len(influence) != len(ids):
        influence = np.zeros(len(ids))
    return shade_html(chat.token_texts(ids), np.clip(np.nan_to_num(influence), 0.0, 1.0))


def picture_uri(png: bytes | None) -> str | None:
    """A stored screenshot as a data URI, scaled down if it is large; None without one that can be read."""
    if png is None:
        return None
    try:
        image = decode_png(png)
    except UnreadableImage:
        return None
    if max(image.size) > PICTURE_SIDE:
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        png = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _episode(batch: TrajectoryBatch, piece: slice, update: int, chat: ChatProcessor | None) -> SampleEpisode:
    length = piece.stop - piece.start
    rows: Sequence[dict[str, Any]] = batch.steps.slice(piece.start, length).to_pylist()
    steps = tuple(
        SampleStep(
            number=row["step"] + 1,
            picture=picture_uri(batch.images.get(row["image"])),
            answer=shaded_answer(row, chat),
            action=row["action"] or "",
            valid=bool(row["valid"]),
            reward=float(row["reward"] or 0.0),
        )
        for row in rows[:STEPS_SHOWN]
    )
    total = sum(float(row["reward"] or 0.0) for row in rows)
    return SampleEpisode(update, total > 0, total, rows[-1]["end_reason"] or "", rows[0]["prompt"] or "", length, steps)
