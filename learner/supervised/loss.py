"""Supervised fine-tuning on demonstrations: cross-entropy, weighted by token."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from learner.policy.batch import TokenBatch
from learner.policy.model import PolicyOutput

#: Nats of uncertainty about the next token from which on a token counts as informative.
UNCERTAIN_NATS = 0.1


class Sft:
    """The algorithm: the loss of some demonstrations."""

    def loss(
        self, output: PolicyOutput, batch: TokenBatch, token_weights: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(parts of the loss, metrics), float32 (B,) each, as `Algorithm.loss` returns them.

        A step's loss is the mean of its tokens' negative log-probabilities, in nats, weighted by `token_weights`
        float32 (B, R) >= 0. Metrics: `loss`; `nll`, the plain mean per token.
        """
        surprise = (-output.logprobs).masked_fill(~batch.response_mask, 0.0)
        weights = token_weights * batch.response_mask
        loss = (surprise * weights).sum(-1) / weights.sum(-1).clamp(min=1e-8)
        plain = surprise.detach().sum(-1) / batch.response_mask.sum(-1).clamp(min=1)
        return {"imitation": loss}, {"loss": loss.detach(), "nll": plain}


def informative_token_weights(
    corpus: Sequence[Sequence[int] | np.ndarray], weight: float, order: int = 2
) -> list[np.ndarray]:
    """Loss weights that stress the tokens which carry something: one float32 array per sequence, as long as it.

    A token is informative, and gets `weight`, where the `order` tokens before it leave the next one open: where its
    entropy in the corpus, given them, exceeds `UNCERTAIN_NATS`. All others are fixed format and get 1. Before the
    start of a sequence stands nothing, which is a context too.
    """
    contexts = [_contexts(sequence, order) for sequence in corpus]
    following: defaultdict[tuple, Counter] = defaultdict(Counter)
    for sequence, befores in zip(corpus, contexts, strict=True):
        for before, token in zip(befores, sequence, strict=True):
            following[before][int(token)] += 1
    uncertain = {before for before, counts in following.items() if _entropy(counts) > UNCERTAIN_NATS}
    return [
        np.array([weight if before in uncertain else 1.0 for before in befores], np.float32) for befores in contexts
    ]


def _contexts(sequence: Sequence[int] | np.ndarray, order: int) -> list[tuple]:
    padded = [None] * order + [int(token) for token in sequence]
    return [tuple(padded[end - order : end]) for end in range(order, len(padded))]


def _entropy(counts: Counter) -> float:
    shares = np.array(list(counts.values()), np.float64)
    shares /= shares.sum()
    return float(-(shares * np.log(shares)).sum())
