"""The soft term of the objective: entropy per token, weighted by the token's influence on the executed action."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learner.settings import EntropyMode, EntropySettings

if TYPE_CHECKING:
    from torch import Tensor

    from learner.batch import TokenBatch


class EntropyBonus:
    """α times the weighted entropy of an utterance: what every algorithm subtracts from its loss."""

    def __init__(self, settings: EntropySettings) -> None:
        self.settings = settings

    def __call__(self, entropy: Tensor, batch: TokenBatch) -> Tensor:
        """entropy float32 (B, R), nats -> float32 (B,), nats per token times α."""
        mode = self.settings.mode
        return self.settings.coefficient * mean_weighted_entropy(mode, entropy, batch.influence, batch.response_mask)


def mean_weighted_entropy(mode: EntropyMode, entropy: Tensor, influence: Tensor, mask: Tensor) -> Tensor:
    """Σ_i B_i H_i / n of each utterance, float32 (B,), nats per token (CoSo, arXiv 2505.03792).

    entropy float32 (B, R), nats; influence float32 (B, R) in [0, 1], taken without gradient; mask bool (B, R), True on
    the n tokens of the utterance. none: zeros; uniform: B_i = 1 (naive soft RL); counterfactual: B_i = influence.
    """
    if mode == "none":
        return entropy.new_zeros(len(entropy))
    weights = mask.float() if mode == "uniform" else influence.detach() * mask
    tokens = mask.sum(-1).clamp(min=1)
    return (weights * entropy.masked_fill(~mask, 0.0)).sum(-1) / tokens
