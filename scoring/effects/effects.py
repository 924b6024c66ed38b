"""Influence of each token on the action (the causal weight B of CoSo, arXiv 2505.03792), computed from effects.

For each token i that can count, the window y[i] ... y[i + w - 1] (clipped at the end) is replaced by the null token,
and all else is kept. An estimator (see `scoring.effects.estimators`) says how much the action changes. The published
one compares the SCM's probabilities of the action taken (w = 4 in the published code):

    effect_i = | p(a | y) - p(a | y with window i nulled) |,    0 where the token does not count
    B_i = sqrt( (effect_i - min_j effect_j) / (max_j effect_j - min_j effect_j + 1e-10) )

with min and max over all tokens j of the utterance, also those that do not count. B is in [0, 1] and has no gradient.
It is the zero vector where there is nothing to measure: the utterance did not parse (all labels are -1), is empty, has
no token that counts, or all its effects are equal (a single token, for instance).

An action of several labels (type, touch cell, typed text, ...) changes when any of them does: p(a | y) is the
product over the heads that apply (see `scoring.scm.model`), which is the published probability where there is one head.

The square root is steep at 0: where an effect is almost 0, an error of 1e-8 in it (about float32's rounding) is an
error of 1e-4 in B. Float64 keeps B within 1e-6 of the formula, at a third of float32's speed.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NORMALISER_FLOOR = 1e-10


def normalised(effects: NDArray[np.floating]) -> NDArray[np.float32]:
    """Turn the effects (n,) of one utterance, n >= 1, into its influence (n,) float32 in [0, 1]."""
    effects = effects.astype(np.float64)
    low, high = effects.min(), effects.max()
    return np.sqrt((effects - low) / (high - low + NORMALISER_FLOOR)).astype(np.float32)


def influence_of(length: int, positions: NDArray[np.integer], effects: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return B, float32 (length,), from the effects (m,) at the positions (m,) that were evaluated; 0 elsewhere."""
    if not len(positions):
        return np.zeros(length, dtype=np.float32)
    everywhere = np.zeros(length)
    everywhere[positions] = effects
    return normalised(everywhere)


def positions_that_change(
    ids: NDArray[np.integer], countable: NDArray[np.bool_], window: int, null_id: int
) -> NDArray[np.intp]:
    """Return the countable positions where nulling changes a token; elsewhere the effect is exactly 0.

    ids: (n,), n >= 0. countable: bool (n,).
    """
    if not len(ids):
        return np.empty(0, dtype=np.intp)
    changes = np.convolve(ids != null_id, np.ones(window, dtype=int))[window - 1 :] > 0
    return np.flatnonzero(countable & changes)


def nulled(ids: NDArray[np.integer], position: int, window: int, null_id: int) -> NDArray[np.integer]:
    """Return a copy of ids (n,) with the window at `position`, clipped at the end, replaced by the null token."""
    changed = ids.copy()
    changed[position : position + window] = null_id
    return changed


def influence_statistics(values: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """Summarise the influence of B >= 0 utterances, for the metrics; all 0 where there is no token.

    `influence_mean`, `influence_max`, `influence_nonzero` (share above 0) are over all tokens.
    `influence_top_decile` is the share of an utterance's influence that its most influential tenth of tokens (rounded
    up) has, averaged over the utterances with any influence. It is about 0.1 where influence is spread evenly, and 1
    where few tokens have all of it.
    """
    tokens = np.concatenate([np.empty(0, dtype=np.float32), *values]).astype(np.float64)
    held = []
    for value in values:
        if value.any():
            ordered = np.sort(value.astype(np.float64))[::-1]
            held.append(ordered[: -(-len(ordered) // 10)].sum() / ordered.sum())
    some = len(tokens) > 0
    return {
        "influence_mean": float(tokens.mean()) if some else 0.0,
        "influence_max": float(tokens.max()) if some else 0.0,
        "influence_nonzero": float((tokens > 0).mean()) if some else 0.0,
        "influence_top_decile": float(np.mean(held)) if held else 0.0,
    }
