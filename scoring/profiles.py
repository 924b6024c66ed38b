"""Where in an answer influence is: averages over positions, and the words that have most of it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def position_profile(values: Sequence[NDArray[np.floating]], bins: int = 20) -> tuple[NDArray, NDArray[np.int64]]:
    """Average influence by relative position in the answer, from its first token (0) to its last (1).

    values: B arrays (n_b,), n_b >= 0. A token i of n lies at (i + 1/2) / n.
    Returns (mean influence of each bin, float64 (bins,), 0 where no token fell; tokens in each, (bins,)).
    """
    total, count = np.zeros(bins), np.zeros(bins, dtype=np.int64)
    for value in values:
        which = ((np.arange(len(value)) + 0.5) / max(1, len(value)) * bins).astype(np.intp)
        np.add.at(total, which, value.astype(np.float64))
        np.add.at(count, which, 1)
    return total / np.maximum(count, 1), count


def influential_words(
    answers: Iterable[tuple[Sequence[str], NDArray[np.floating]]], count: int = 12
) -> list[tuple[str, float, int]]:
    """Find the token texts with the largest mean influence: (text, mean, occurrences), the largest first.

    answers: pairs of n token texts and their influence (n,). Texts that differ only in surrounding blanks count as one;
    a text without influence in all answers is left out.
    """
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for texts, values in answers:
        for text, value in zip(texts, values, strict=True):
            held = totals[text.strip()]
            held[0] += float(value)
            held[1] += 1
    means = [(text, total / number, int(number)) for text, (total, number) in totals.items() if text and total > 0]
    return sorted(means, key=lambda entry: (-entry[1], entry[0]))[:count]
