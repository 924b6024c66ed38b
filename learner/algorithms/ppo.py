"""PPO over utterances with chain-of-thought weighting (RL4VLM, arXiv 2405.10292), with the soft term of CoSo.

Three policies take part: *behaviour*, the engine that sampled each token; *proximal*, the learner as the update begins;
*current*, the learner now. The clip is around the proximal policy, and a truncated weight carries from behaviour to
proximal (decoupled PPO: arXiv 2110.00641; AReaL: 2505.24298). The weight also absorbs the engine's rounding. With
`decoupled: false` the one clip is around the behaviour policy, as published for lock-step training.

A step's log-probability is λ · (thought tokens) + (action tokens). An utterance in which no action part is found is all
thoughts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, PositiveFloat

from envs.settings import NonNegative, Probability
from learner.algorithms.base import Algorithm, AlgorithmSettings, Evaluation, Targets
from learner.algorithms.gae import gae
from learner.algorithms.returns import ReturnScale
from scoring.calibration import of_values

if TYPE_CHECKING:
    from torch import Tensor

    from actors.trajectory import TrajectoryBatch
    from learner.algorithms.entropy import EntropyBonus
    from learner.policy.batch import TokenBatch
    from learner.policy.model import PolicyOutput

#: A ratio of e^20 is far beyond any limit, and finite: an infinite one would make its gradient 0 · inf.
LARGEST_LOG_RATIO = 20.0


class PpoSettings(AlgorithmSettings):
    """PPO with chain-of-thought weighting (RL4VLM, arXiv 2405.10292). Defaults are the published figures for cards."""

    discount: Probability = Field(0.9, description="γ.")
    gae_lambda: Probability = Field(0.95, description="λ of generalised advantage estimation.")
    clip: PositiveFloat = Field(0.1, description="Clip range of the ratio.")
    decoupled: bool = Field(
        True,
        description="Clip around the policy as the update begins, and weigh by its ratio to the policy that sampled; "
        "false: clip around the policy that sampled.",
    )
    importance: Literal["none", "truncated", "masked"] = Field(
        "truncated",
        description="decoupled: the ratio of proximal to behaviour policy, as a weight. none: no weight; truncated: at "
        "most `importance_limit`; masked: 0 above it.",
    )
    importance_limit: PositiveFloat = Field(2.0, description="Largest such weight.")
    ratio_level: Literal["step", "token"] = Field(
        "step",
        description="Ratios, clip and weight of a whole step (published), or of each token, with thought tokens "
        "counting λ.",
    )
    ratio_limit: PositiveFloat = Field(
        10.0, description="Where a ratio in the minibatch exceeds this, only the clipped surrogate is used."
    )
    thought_weight: NonNegative = Field(0.5, description="λ on thought tokens (cards 0.5, ALFWorld 0.2).")
    kl_limit: PositiveFloat | None = Field(
        None,
        description="End an update's passes once the mean KL of an answer from the policy as the update began exceeds "
        "this, nats (measured over one minibatch, before its step); null: make all passes.",
    )
    normalize_advantages: bool = Field(
        True,
        description="Zero mean over the batch, and divided by the batch's deviation or, where that is larger and "
        "`normalize_returns` is on, the running deviation of returns.",
    )
    value_coefficient: NonNegative = Field(0.5, description="Weight of the value loss.")
    value_gradient: bool = Field(True, description="Let the value loss train the trunk too.")
    value_clip: PositiveFloat | None = Field(
        None, description="Clip range of the value around its old one, in deviations of the return; null: no clip."
    )
    normalize_returns: bool = Field(
        True, description="Learn values in deviations from the running mean of returns; false: in units of reward."
    )


class Ppo(Algorithm):
    """The algorithm: targets of a batch of episodes, and the loss of some of its steps."""

    name = "ppo"
    Settings = PpoSettings
    needs = ("response_ids", "behaviour_logprobs")
    settings: PpoSettings

    def __init__(self, settings: PpoSettings, entropy: EntropyBonus) -> None:
        super().__init__(settings, entropy)
        self.scale = ReturnScale()

    @property
    def value_gradient(self) -> bool:
        return self.settings.value_gradient

    def targets(self, trajectories: TrajectoryBatch, evaluation: Evaluation) -> Targets:
        """Per step `advantages`, `returns` and `old_values` (both as the value head says them), per token
        `proximal_logprobs`, of whole episodes.

        How an episode ends decides what follows its last step: nothing if it terminated; the value of the final
        observation if it was cut off. If its environment failed, the outcome of that last step is unknown, which is
        neither a reward of zero nor an end: the step's value stands in for its return, so that its own advantage is 0
        and the steps before it count on what the critic expected there.
        """
        settings, scale = self.settings, self.scale
        values, final_values = scale.restored(evaluation.values), scale.restored(evaluation.final_values)
        rewards = trajectories.column("reward")
        terminated = trajectories.column("terminated")
        advantages = np.zeros(len(trajectories))
        followed = np.zeros(len(trajectories))  # the return, with the critic only where an episode was cut off
        known = evaluation.trained.copy()
        for episode in trajectories.episode_slices():
            last = episode.stop - 1
            if terminated[last]:
                end, bootstrap = episode.stop, 0.0
            elif np.isfinite(final_values[last]):
                end, bootstrap = episode.stop, float(final_values[last])
            else:
                end, bootstrap = last, float(values[last])
                known[last] = False
            steps = slice(episode.start, end)
            advantages[steps] = gae(rewards[steps], values[steps], bootstrap, settings.discount, settings.gae_lambda)
            followed[steps] = values[steps] + gae(rewards[steps], values[steps], bootstrap, settings.discount, 1.0)
        returns = advantages + values
        metrics = {
            "explained_variance": explained_variance(values[known], returns[known]),
            "return_mean": float(returns[known].mean()) if known.any() else 0.0,
            "value_mean": float(values.mean()),
            **value_calibration(values[known], followed[known]),
        }
        gain, shift = scale.update(returns[known]) if settings.normalize_returns and known.any() else (1.0, 0.0)
        if settings.normalize_advantages and known.any():
            # Where nearly all episodes go alike, what is left of the advantages is the critic's error: it must not be
            # blown up to the size of a real difference.
            usual = scale.deviation if settings.normalize_returns else 0.0
            spread = max(advantages[known].std(), usual)
            advantages = np.where(known, (advantages - advantages[known].mean()) / (spread + 1e-8), 0.0)
        columns = {
            "advantages": advantages,
            "returns": scale.normalised(returns),
            "old_values": gain * evaluation.values + shift,
        }
        return Targets(
            per_step={name: column.astype(np.float32) for name, column in columns.items()},
            per_token={"proximal_logprobs": evaluation.logprobs},
            metrics=metrics,
            value_gain=gain,
            value_shift=shift,
        )

    def loss(self, output: PolicyOutput, batch: TokenBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The clipped surrogate, the value loss and the soft term; see `Algorithm.loss`."""
        surrogate, metrics = self._surrogate(output, batch)
        value_error = self._value_error(output.values, batch)
        bonus, of_entropy = self.entropy(output.entropy, batch)
        parts = {
            "policy": -surrogate,
            "value": self.settings.value_coefficient * 0.5 * value_error,
            "entropy": -bonus,
        }
        metrics |= of_entropy | {
            "policy_loss": -surrogate.detach(),
            "value_loss": 0.5 * value_error.detach(),
            "approx_kl": _kl(output.logprobs, batch.behaviour_logprobs, batch.response_mask),
            "update_kl": _kl(output.logprobs, batch.targets["proximal_logprobs"], batch.response_mask),
        }
        return parts, metrics

    def enough(self, step_metrics: dict[str, float]) -> bool:
        limit = self.settings.kl_limit
        return limit is not None and step_metrics["update_kl"] > limit

    @property
    def may_end_early(self) -> bool:
        return self.settings.kl_limit is not None

    def token_factors(self, batch: TokenBatch) -> Tensor:
        """λ on thought tokens, 1 on action tokens, 0 where padded: float32 (B, R)."""
        import torch

        factors = torch.where(batch.action_mask, 1.0, self.settings.thought_weight)
        return factors.masked_fill(~batch.response_mask, 0.0)

    def _surrogate(self, output: PolicyOutput, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(float32 (B,), metrics): weight · min(ratio · A, clipped ratio · A), of steps, or of tokens and summed."""
        import torch

        settings = self.settings
        factors, proximal = self.token_factors(batch), batch.targets["proximal_logprobs"]
        anchor = proximal if settings.decoupled else batch.behaviour_logprobs
        change, correction = output.logprobs - anchor, proximal - batch.behaviour_logprobs
        if settings.ratio_level == "step":
            change, correction = ((factors * part).sum(-1, keepdim=True) for part in (change, correction))
            factors = factors.new_ones(len(factors), 1)
        ratio = change.clamp(max=LARGEST_LOG_RATIO).exp()
        advantages = batch.targets["advantages"][:, None]
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip) * advantages
        # "Where a ratio in the minibatch exceeds the limit": published with minibatches of one step, so each its own.
        surrogate = torch.where(ratio > settings.ratio_limit, clipped, torch.minimum(ratio * advantages, clipped))
        weight = correction.clamp(max=LARGEST_LOG_RATIO).exp()
        beyond = (weight > settings.importance_limit) & (factors > 0)
        if not settings.decoupled or settings.importance == "none":
            weight = torch.ones_like(weight)
        elif settings.importance == "masked":
            weight = weight.masked_fill(beyond, 0.0)
        else:
            weight = weight.clamp(max=settings.importance_limit)
        counted = (factors > 0).float()
        share = counted / counted.sum(-1, keepdim=True).clamp(min=1)
        ratio = ratio.detach()
        metrics = {
            "clip_fraction": (((ratio - 1).abs() > settings.clip) * share).sum(-1),
            "importance_weight": (weight * share).sum(-1),
            "importance_beyond_limit": beyond.any(-1).float(),
            "ratio_max": (ratio * counted).amax(-1),
        }
        return (factors * weight * surrogate).sum(-1), metrics

    def _value_error(self, values: Tensor, batch: TokenBatch) -> Tensor:
        """Squared error of the values, float32 (B,), in deviations of the return; the larger of two where clipped."""
        import torch

        returns, old, clip = batch.targets["returns"], batch.targets["old_values"], self.settings.value_clip
        error = (values - returns).square()
        if clip is None:
            return error
        return torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns).square())

    def state(self) -> dict[str, float]:
        return super().state() | self.scale.state()

    def load(self, state: dict[str, float]) -> None:
        super().load(state)
        self.scale.load(state)


def _kl(current: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """KL(other ‖ current) of each answer by the k3 estimator e^Δ − 1 − Δ, float32 (B,), nats, without gradient."""
    drift = (current - other).detach().masked_fill(~mask, 0.0)
    return (drift.clamp(max=LARGEST_LOG_RATIO).exp() - 1 - drift).sum(-1)


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 − var(returns − values) / var(returns); NaN where the returns do not vary."""
    variance = returns.var() if len(returns) else 0.0
    return float(1 - (returns - values).var() / variance) if variance > 0 else float("nan")


def value_calibration(values: np.ndarray, returns: np.ndarray) -> dict[str, float]:
    """How far the values (N,) of a bin are from the returns (N,) that followed, both in units of reward; {} for N = 0.

    `value_calibration_error` in units of reward, `value_calibration_deviations` in deviations of the returns (NaN where
    they do not vary), and the points of the curve.
    """
    if not len(values):
        return {}
    curve, deviation = of_values(values, returns), float(returns.std())
    return {
        "value_calibration_error": curve.error,
        "value_calibration_deviations": curve.error / deviation if deviation > 0 else float("nan"),
        **curve.metrics(),
    }
