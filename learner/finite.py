"""Nothing that is not finite passes: log-probabilities, values, losses, gradients, weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from actors.trajectory import TrajectoryBatch

#: Steps of a batch that a message names.
NAMED_STEPS = 5


class NotFinite(ArithmeticError):
    """NaN or infinity where a number is needed; the message says what it is and which steps made it."""


def named_steps(trajectories: TrajectoryBatch, rows: Sequence[int] | np.ndarray) -> str:
    """Some of the steps of the given row numbers, as a person can look them up in the run's log."""
    episodes, steps = trajectories.column("episode"), trajectories.column("step")
    names = [f"episode {episodes[row]} step {steps[row]}" for row in list(rows)[:NAMED_STEPS]]
    more = f" and {len(rows) - NAMED_STEPS} more" if len(rows) > NAMED_STEPS else ""
    return ", ".join(names) + more


def require_finite_steps(what: str, per_step: Iterable[np.ndarray | float], trajectories: TrajectoryBatch) -> None:
    """per_step: what belongs to each step. Raises `NotFinite` naming the steps that have NaN or infinity."""
    wrong = [row for row, numbers in enumerate(per_step) if not np.isfinite(numbers).all()]
    if wrong:
        raise NotFinite(
            f"{what} are not finite for {len(wrong)} of {len(trajectories)} steps "
            f"({named_steps(trajectories, wrong)}). The weights are broken, or these steps' input is."
        )


def finite_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same pairs. Raises `NotFinite` after the last one (gathering is a collective: all ranks go to its end)."""
    wrong = []
    for name, tensor in weights:
        if not bool(tensor.isfinite().all()):
            wrong.append(name)
        yield name, tensor
    if wrong:
        raise NotFinite(
            f"weights are not finite ({', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}), so they are neither "
            "published nor saved; resume from the last checkpoint with a smaller learning rate"
        )
