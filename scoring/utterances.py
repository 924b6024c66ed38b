"""Utterances as arrays: checks, duplicates, tasks for scorers, and conversion to tensors."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def check_utterances(
    utterances: Sequence[NDArray[np.integer]],
    labels: NDArray[np.integer],
    *,
    vocab_size: int,
    head_sizes: Sequence[int] | None,
) -> None:
    """Raise ValueError, naming the utterance at fault, unless the batch fits vocabulary and heads.

    utterances: B integer arrays (n_b,), n_b >= 0, of ids in 0 ... vocab_size - 1.
    labels: integers (B, K), K = len(head_sizes), each in -1 ... head_sizes[k] - 1; without head_sizes, at least -1.
    """
    expected = (len(utterances), labels.shape[-1] if head_sizes is None else len(head_sizes))
    if labels.shape != expected:
        raise ValueError(f"action labels have shape {labels.shape}, not {expected} (utterances, heads)")
    for row, ids in enumerate(utterances):
        if ids.ndim != 1:
            raise ValueError(f"utterance {row} has shape {ids.shape}: give a flat array of token ids")
        if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
            raise ValueError(
                f"utterance {row} has token ids from {ids.min()} to {ids.max()}, but only 0 to {vocab_size - 1} exist: "
                "the SCM must have the policy's vocabulary size, and the tokenizer must be the policy's"
            )
    limits = np.full(expected[1], np.iinfo(np.int32).max) if head_sizes is None else np.asarray(head_sizes)
    wrong = (labels < -1) | (labels >= limits)
    if wrong.any():
        row, head = np.argwhere(wrong)[0]
        raise ValueError(
            f"utterance {row} has label {labels[row, head]} for head {head}: it takes -1 to {limits[head] - 1}"
        )


def distinct_pairs(
    utterances: Sequence[NDArray[np.integer]], labels: NDArray[np.integer]
) -> tuple[list[int], NDArray[np.int64]]:
    """Find the distinct (ids, labels) pairs, in order of first occurrence.

    Returns (first, which): the first row of each distinct pair, and for each row the index of its pair in
    `first`, so that `[result_of_first[i] for i in which]` gives every row its result.
    """
    seen: dict[tuple[bytes, bytes], int] = {}
    first: list[int] = []
    which = np.empty(len(utterances), dtype=np.int64)
    for row, ids in enumerate(utterances):
        key = (np.asarray(ids, dtype=np.int64).tobytes(), np.asarray(labels[row], dtype=np.int64).tobytes())
        which[row] = seen.setdefault(key, len(first))
        if which[row] == len(first):
            first.append(row)
    return first, which


def cut_into_tasks(costs: Mapping[int, int], *, workers: int, most: int, most_cost: int) -> list[list[int]]:
    """Cut rows into tasks for workers that pull them, the most costly rows first.

    costs: of each row. most, most_cost: largest number of rows in a task, and largest sum of their costs. Besides, no
    task costs more than one worker's share of the rows that are left: tasks get smaller towards the end, and all
    workers end at about the same time (guided self-scheduling, Polychronopoulos & Kuck 1987). A row that costs more
    than these limits is a task by itself.
    """
    tasks: list[list[int]] = []
    left, room = sum(costs.values()), 0.0
    for row in sorted(costs, key=lambda row: -costs[row]):
        if not tasks or len(tasks[-1]) >= most or costs[row] > room:
            tasks.append([])
            room = min(most_cost, left / workers)
        tasks[-1].append(row)
        room -= costs[row]
        left -= costs[row]
    return tasks


def flatten(arrays: Sequence[NDArray]) -> tuple[NDArray, NDArray[np.int64]]:
    """Join arrays (n_b,) end to end: (the joined array (sum n_b,), the lengths (B,)); `split` undoes it."""
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    return (np.concatenate(arrays) if len(arrays) else np.empty(0, dtype=np.int32)), lengths


def split(joined: NDArray, lengths: NDArray[np.int64]) -> list[NDArray]:
    """Cut an array (sum n_b,) into B arrays (n_b,); views, not copies."""
    return np.split(joined, np.cumsum(lengths)[:-1]) if len(lengths) else []


def padded(utterances: Sequence[NDArray[np.integer]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return (ids (B, T) int64, zeros after each row's end; lengths (B,) int64) on `device`."""
    lengths = np.array([len(ids) for ids in utterances], dtype=np.int64)
    ids = np.zeros((len(utterances), int(lengths.max())), dtype=np.int64)
    for row, utterance in enumerate(utterances):
        ids[row, : len(utterance)] = utterance
    return torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device)
