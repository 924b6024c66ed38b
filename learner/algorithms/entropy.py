"""The soft term of the objective: entropy per token, weighted by the token's influence on the executed action."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EntropyMode = Literal["none", "uniform", "counterfactual"]


def mean_weighted_entropy(mode: EntropyMode, entropy: Tensor, influence: Tensor, mask: Tensor) -> Tensor:
    """Σ_i B_i H_i / n of each utterance, float32 (B,), nats per token (CoSo, arXiv 2505.03792).

    entropy float32 (B, R), nats; influence float32 (B, R) in [0, 1], taken without gradient; mask bool (B, R), True on
    the n tokens of the utterance. none: zeros; uniform: B_i = 1 (naive soft RL); counterfactual: B_i = influence.
    """
    if mode == "none":
        return torch.zeros(len(entropy), device=entropy.device)
    weights = mask.float() if mode == "uniform" else influence.detach() * mask
    tokens = mask.sum(-1).clamp(min=1)
    return (weights * entropy.masked_fill(~mask, 0.0)).sum(-1) / tokens
