"""The soft term of the objective: entropy per token, weighted by the token's influence on the executed action.

    bonus = α · Σ_i B_i H_i / n        in nats per token of the answer, n tokens

(CoSo, arXiv 2505.03792.) With B as published, most tokens count for little, so the bonus is small: for an answer of 40
tokens of which 2 decide (B = 1), α = 1 is 1/20 nat per nat of a deciding token's entropy.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from learner.settings import EntropySettings

if TYPE_CHECKING:
    from torch import Tensor

    from learner.policy.batch import TokenBatch


#: What the present distance from the target counts in log α. On a bandit of ten arms, of 0, 0.5, 1, 2 and 4, this one
#: reached the target soonest over two learning rates and three starts.
DAMPING = 1.0


class EntropyBonus:
    """α times the weighted entropy of an utterance: what every algorithm adds to its objective.

    With `entropy.target`, α follows the weighted entropy as in soft actor-critic (arXiv 1812.05905): it rises while
    the entropy is below the target and falls while it is above. `state` and `load` carry it over a resume.
    """

    def __init__(self, settings: EntropySettings) -> None:
        self.settings = settings
        self.coefficient = settings.coefficient  # α now
        self._integral = math.log(settings.coefficient) if settings.coefficient > 0 else 0.0

    def __call__(self, entropy: Tensor, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """entropy float32 (B, R), nats -> (the bonus float32 (B,), what to log of it: float32 (B,) each)."""
        mask = batch.response_mask
        weights = token_weights(self.settings, entropy, batch)
        weighted = _mean_per_token(weights * entropy, mask)
        seen = {
            "entropy": _mean_per_token(entropy.detach(), mask),
            "weighted_entropy": weighted.detach(),
            "entropy_weight": _mean_per_token(weights, mask),
            "entropy_bonus": self.coefficient * weighted.detach(),
        }
        return self.coefficient * weighted, seen

    @property
    def tuned(self) -> bool:
        """Whether `adapt` has anything to do."""
        return self.settings.target is not None and self.settings.mode != "none"

    def adapt(self, weighted_entropy: float, progress: float) -> None:
        """After an optimizer step: log α is the sum of `target_rate` times the relative distances from the target so
        far, plus the present distance. The second part damps: with the sum alone α swings, since the policy follows
        it only step by step.

        weighted_entropy: mean over the step's samples of all ranks, nats per token; progress: share of the run that is
        done, in [0, 1], for the target's course from `target` to `final_target`.
        """
        settings = self.settings
        assert settings.target is not None
        final = settings.target if settings.final_target is None else settings.final_target
        target = settings.target + (final - settings.target) * progress
        distance = (target - weighted_entropy) / target
        low, high = math.log(settings.coefficient_min), math.log(settings.coefficient_max)
        self._integral = min(max(self._integral + settings.target_rate * distance, low), high)
        self.coefficient = math.exp(min(max(self._integral + DAMPING * distance, low), high))

    def state(self) -> dict[str, float]:
        return {"entropy_coefficient": self.coefficient, "entropy_integral": self._integral}

    def load(self, state: dict[str, float]) -> None:
        """Continue from `state`. A fixed α is always that of the settings."""
        if self.tuned:
            self.coefficient = state["entropy_coefficient"]
            self._integral = state["entropy_integral"]


def token_weights(settings: EntropySettings, entropy: Tensor, batch: TokenBatch) -> Tensor:
    """The weight B_i of every token: float32 (B, R), 0 where padded, no gradient.

    By `settings.mode`: `none` zeros; `uniform` ones (naive soft RL); `counterfactual` the influence (CoSo);
    `action_tokens` 1 on the part that the parser reads; `random` the influence, shuffled within the answer by its
    token ids; `token_entropy` the policy's own entropy over the largest of the answer. With `settings.weighting`
    `mass` the weights of an answer are scaled to sum to its number of tokens.
    """
    mask = batch.response_mask.float()
    if settings.mode == "none":
        return mask * 0.0
    if settings.mode == "uniform":
        return mask
    if settings.mode == "action_tokens":
        weights = batch.action_mask.float()
    elif settings.mode == "token_entropy":
        own = entropy.detach().masked_fill(~batch.response_mask, 0.0)
        weights = own / own.amax(-1, keepdim=True).clamp(min=1e-10)
    else:
        weights = batch.influence.detach()
        if settings.mode == "random":
            weights = _shuffled(weights, batch)
    weights = weights * mask
    if settings.weighting == "mass":
        total = weights.sum(-1, keepdim=True)
        weights = weights * (mask.sum(-1, keepdim=True) / total.clamp(min=1e-10))
    return weights


def _mean_per_token(values: Tensor, mask: Tensor) -> Tensor:
    """float32 (B, R) -> (B,): the mean over an answer's tokens; 0 for an answer without any."""
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def _shuffled(weights: Tensor, batch: TokenBatch) -> Tensor:
    """Each row's weights in an order that depends on its own token ids alone, however the batch is cut."""
    import torch

    shuffled = torch.zeros_like(weights)
    rows = zip(batch.response_ids.tolist(), batch.response_lengths.tolist(), strict=True)
    for row, (ids, length) in enumerate(rows):
        generator = torch.Generator().manual_seed(hash(tuple(ids[:length])) % 2**63)
        order = torch.randperm(length, generator=generator).to(weights.device)
        shuffled[row, :length] = weights[row, order]
    return shuffled
