"""How the steps of a minibatch are divided into micro-batches and over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    """Steps of one forward pass of one rank; a filler is run so that ranks stay in step, and counts for nothing."""

    indices: np.ndarray  # int64 (b,), row numbers in the trajectories
    filler: bool


def divide(indices: np.ndarray, lengths: np.ndarray, micro_batch: int, rank: int, world_size: int) -> list[MicroBatch]:
    """The share of `rank`: micro-batches of at most `micro_batch` of the given steps.

    indices: int64 (M,), row numbers; lengths: int64 of all rows, tokens. Steps of like length go together, so that
    little is padded; micro-batches are dealt out in turn, so that ranks get like amounts of work. Every rank gets the
    same number of micro-batches (under ZeRO-3 every forward pass is a collective): where there are too few, the rank
    gets one step again as a filler. Together the ranks' micro-batches that are no fillers hold every step once.
    """
    ordered = indices[np.argsort(lengths[indices], kind="stable")]
    parts = [ordered[start : start + micro_batch] for start in range(0, len(ordered), micro_batch)]
    mine = [MicroBatch(part, filler=False) for part in parts[rank::world_size]]
    while len(mine) < -(-len(parts) // world_size):
        mine.append(MicroBatch(ordered[:1], filler=True))
    return mine


def minibatches(steps: int, size: int, seed: tuple[int, ...]) -> list[np.ndarray]:
    """A permutation of `steps` rows cut evenly into minibatches of about `size`: their sizes differ by at most one.

    A small last minibatch would move the weights as far as a full one (the mean, the gradient clip and Adam hide its
    size), so there is none. The same on every rank for the same seed.
    """
    order = np.random.default_rng(seed).permutation(steps)
    return np.array_split(order, max(1, round(steps / size)))
