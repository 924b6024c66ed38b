"""How well an estimate of influence agrees with the exact interventions of the parser.

Ranks are compared, since influence is relative within an utterance. Where the parser gives every token the same effect
(no token changes the action, or every token does), there is no ranking, and the utterance is left out.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return ranks 1 ... n, (n,); equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[which]


def spearman(left: NDArray[np.floating], right: NDArray[np.floating]) -> float | None:
    """Return Spearman's rank correlation of (n,) and (n,), in [-1, 1]; None where either is constant."""
    if not len(left) or (left == left[0]).all() or (right == right[0]).all():
        return None
    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


def top_overlap(estimate: NDArray[np.floating], truth: NDArray[np.floating]) -> float | None:
    """Return the share, in [0, 1], of the tokens with true influence that are among as many top tokens of the estimate.

    With k tokens above 0 in `truth`, the top k of `estimate` are taken; of equal ones, the earlier. None where k is 0
    or the number of all tokens.
    """
    true = truth > 0
    count = int(true.sum())
    if count in (0, len(true)):
        return None
    top = np.argsort(-estimate, kind="stable")[:count]
    return float(true[top].mean())


def span_mass(values: NDArray[np.floating], start: int) -> float | None:
    """Return the share, in [0, 1], of the influence (n,) that lies at or after token `start`.

    None where there is no such token, as for an answer without an action part, or no influence.
    """
    total = float(values.sum(dtype=np.float64))
    return float(values[start:].sum(dtype=np.float64)) / total if start < len(values) and total > 0 else None


def agreement(
    estimate: Sequence[NDArray[np.floating]],
    truth: Sequence[NDArray[np.floating]],
    countable: Sequence[NDArray[np.bool_]],
) -> dict[str, float]:
    """Summarise how far estimated influence agrees with the true one, over B utterances, each with (n_b,) arrays.

    Only tokens that can count are compared: the others are 0 in both.
    Returns `spearman` and `top_overlap`, means over the utterances where they are defined; left out where none is.
    """
    pairs = [(left[can], right[can]) for left, right, can in zip(estimate, truth, countable, strict=True)]
    return mean_of_defined(
        {
            "spearman": [spearman(left, right) for left, right in pairs],
            "top_overlap": [top_overlap(left, right) for left, right in pairs],
        }
    )


def mean_of_defined(measured: dict[str, list[float | None]]) -> dict[str, float]:
    """Return each name's mean over what is not None; a name with nothing is left out."""
    defined = {name: [value for value in values if value is not None] for name, values in measured.items()}
    return {name: float(np.mean(values)) for name, values in defined.items() if values}
