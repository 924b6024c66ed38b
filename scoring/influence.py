"""Influence of each token on the action, by counterfactuals: the causal weight B of CoSo (arXiv 2505.03792).

For each token i that can count, the window y[i] ... y[i + w - 1] (clipped at the end) is replaced by the
null token, all else is kept, and the SCM is asked how much the probability of the action really taken
changes (w = 4 in the published code):

    effect_i = | p(a | y) - p(a | y with window i nulled) |,    0 where the token does not count
    B_i = sqrt( (effect_i - min_j effect_j) / (max_j effect_j - min_j effect_j + 1e-10) )

with min and max over all tokens j of the utterance, those that do not count included. B is in [0, 1] and
has no gradient. It is the zero vector where there is nothing to measure: the utterance did not parse (all
labels -1), is empty, has no token that counts, or all its effects are equal (as when it is a single token).

The square root is steep at 0: an error of 1e-8 in an effect, about what float32 leaves, is 1e-4 in B. An
SCM in float64 keeps B within 1e-6 of the formula however it is batched, in about twice float32's time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from scoring.scm import StructuralCausalModel
from scoring.utterances import check_utterances, distinct_pairs, padded

NORMALISER_FLOOR = 1e-10


@dataclass(frozen=True, kw_only=True)
class Influence:
    """Influence of a batch of utterances.

    values: B float32 arrays (n_b,), in [0, 1].
    distinct: number of distinct (ids, labels) pairs among them.
    counterfactuals: number of counterfactual utterances the SCM was asked about.
    """

    values: list[NDArray[np.float32]]
    distinct: int
    counterfactuals: int


def normalised(effects: NDArray[np.floating]) -> NDArray[np.float32]:
    """Turn the effects (n,) of one utterance, n >= 1, into its influence (n,) float32 in [0, 1]."""
    effects = effects.astype(np.float64)
    low, high = effects.min(), effects.max()
    return np.sqrt((effects - low) / (high - low + NORMALISER_FLOOR)).astype(np.float32)


@torch.inference_mode()
def influence(
    scm: StructuralCausalModel,
    utterances: Sequence[NDArray[np.integer]],
    action_labels: NDArray[np.integer],
    countable: Sequence[NDArray[np.bool_]],
    *,
    window: int,
    null_id: int,
    batch_tokens: int,
) -> Influence:
    """Score a batch of utterances against the actions they led to.

    Each distinct (ids, labels) pair is scored once, and only at positions that count and that nulling would
    change. What is to be evaluated is put in order of length and cut into batches of at most `batch_tokens`
    padded tokens (at least one row); the cut depends on the arguments alone.

    utterances: B integer arrays (n_b,), n_b >= 0. action_labels: (B, K), -1 where a head does not apply.
    countable: B bool arrays (n_b,), a function of the ids. window: w >= 1, in tokens.
    Raises ValueError when shapes, ids or labels do not fit the SCM.
    """
    if window < 1 or batch_tokens < 1:
        raise ValueError(f"window ({window}) and batch_tokens ({batch_tokens}) must be at least 1")
    settings = scm.settings
    check_utterances(utterances, action_labels, vocab_size=settings.vocab_size, head_sizes=settings.head_sizes)
    if [len(mask) for mask in countable] != [len(ids) for ids in utterances]:
        raise ValueError("countable must have one bool array per utterance, as long as the utterance")

    first, which = distinct_pairs(utterances, action_labels)
    effects = {row: np.zeros(len(utterances[row])) for row in first}
    scored = [row for row in first if len(utterances[row]) and (action_labels[row] >= 0).any()]
    positions = {row: _positions_that_change(utterances[row], countable[row], window, null_id) for row in scored}
    # Each utterance as it is (-1) before its counterfactuals; the sort is stable and keeps that order.
    tasks = [(row, -1) for row in scored if len(positions[row])]
    tasks += [(row, int(position)) for row in scored for position in positions[row]]
    tasks.sort(key=lambda task: len(utterances[task[0]]))

    device = scm.token_embedding.weight.device
    factual: dict[int, float] = {}
    for batch in _batches(tasks, [len(ids) for ids in utterances], batch_tokens):
        rows = [_nulled(utterances[row], position, window, null_id) for row, position in batch]
        labels = torch.from_numpy(action_labels[[row for row, _ in batch]].astype(np.int64)).to(device)
        logs = scm.action_log_probability(*padded(rows, device), labels)
        # p - 1 rather than p: differences of probabilities near 1 keep their digits.
        less_one = torch.expm1(logs).to("cpu", torch.float64).tolist()
        for (row, position), value in zip(batch, less_one, strict=True):
            if position < 0:
                factual[row] = value
            else:
                effects[row][position] = abs(factual[row] - value)

    result = {row: normalised(effect) if len(effect) else effect.astype(np.float32) for row, effect in effects.items()}
    return Influence(
        values=[result[first[pair]] for pair in which],
        distinct=len(first),
        counterfactuals=sum(len(changed) for changed in positions.values()),
    )


def _positions_that_change(
    ids: NDArray[np.integer], countable: NDArray[np.bool_], window: int, null_id: int
) -> NDArray[np.intp]:
    """Return the countable positions whose window is not all null already; elsewhere the effect is exactly 0."""
    changes = np.convolve(ids != null_id, np.ones(window, dtype=int))[window - 1 :] > 0
    return np.flatnonzero(countable & changes)


def _nulled(ids: NDArray[np.integer], position: int, window: int, null_id: int) -> NDArray[np.integer]:
    if position < 0:
        return ids
    changed = ids.copy()
    changed[position : position + window] = null_id
    return changed


def _batches(
    tasks: Sequence[tuple[int, int]], lengths: Sequence[int], batch_tokens: int
) -> Iterator[Sequence[tuple[int, int]]]:
    """Cut tasks, in order of length, into runs whose rows x longest length stays within batch_tokens."""
    start = 0
    for end, (row, _) in enumerate(tasks):
        if end > start and (end - start + 1) * lengths[row] > batch_tokens:
            yield tasks[start:end]
            start = end
    if start < len(tasks):
        yield tasks[start:]


def influence_statistics(values: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """Summarise the influence of B >= 0 utterances, for the metrics; all 0 where there is no token.

    `influence_mean`, `influence_max`, `influence_nonzero` (share above 0) are over all tokens.
    `influence_top_decile` is the share of an utterance's influence that its most influential tenth of
    tokens (rounded up) holds, averaged over the utterances with any influence: about 0.1 is an influence
    spread evenly, 1 is one held by few tokens.
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
