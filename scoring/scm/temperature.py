"""Temperature scaling of the SCM (Guo et al. 2017): its logits are divided by one number, fitted on answers that it is
not trained on, so that its probabilities are as often right as they say.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

HELD_OUT_OF = 10
"""One of so many answers is kept out of training."""
FEWEST_HELD_OUT = 16
"""With fewer distinct answers held out, no temperature is fitted."""
LOWEST, HIGHEST = 0.1, 10.0
"""Bounds of the temperature. An SCM that is right on all held-out answers would get 0, and so no influence at all."""

_HALVINGS = 40


def is_held_out(ids: NDArray[np.int32]) -> bool:
    """Whether an answer (n,) is kept out of training. Its ids decide, because agents repeat themselves: a copy of a
    held-out answer is held out too, in every update and after a resume."""
    return zlib.crc32(ids.tobytes()) % HELD_OUT_OF == 0


def fit_temperature(logits: Sequence[Tensor], labels: Tensor) -> float:
    """Return the temperature in [LOWEST, HIGHEST] with the smallest cross-entropy.

    logits: K tensors (B, size_k), not scaled, B >= 1. labels: (B, K) int64, -1 where a head does not apply.

    The cross-entropy is convex in the inverse temperature β, so its slope grows with β: the sum over heads of
    E_β[logit] - logit of the label. Bisection finds where it is 0.
    """
    cold, hot = 1.0 / LOWEST, 1.0 / HIGHEST  # as β
    applied = []
    for head, head_logits in enumerate(logits):
        rows = labels[:, head] >= 0
        chosen = head_logits[rows].double()
        applied.append((chosen, chosen.gather(1, labels[rows, head, None])))

    def slope(beta: float) -> float:
        return sum(
            float((((beta * each).softmax(dim=-1) * each).sum(dim=-1, keepdim=True) - of_label).sum())
            for each, of_label in applied
        )

    for _ in range(_HALVINGS):
        middle = (cold + hot) / 2
        if slope(middle) > 0:
            cold = middle
        else:
            hot = middle
    return 2 / (cold + hot)
