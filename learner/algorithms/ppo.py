"""PPO over utterances with chain-of-thought weighting (RL4VLM, arXiv 2405.10292), with the soft term of CoSo.

A step's log-probability is λ · (thought tokens) + (action tokens). An utterance in which no action part is found is all
thoughts. The ratio is taken against the log-probabilities that were sampled from, so data made by older weights is
weighted as importance sampling has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, PositiveFloat

from envs.settings import NonNegative, Probability
from learner.algorithms.advantages import gae
from learner.algorithms.base import Algorithm, AlgorithmSettings, Evaluation, Targets
from learner.algorithms.entropy import mean_weighted_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from actors.trajectory import TrajectoryBatch
    from learner.batch import TokenBatch
    from learner.model import PolicyOutput

#: A ratio of e^20 is far beyond any limit, and finite: an infinite one would make its gradient 0 · inf.
LARGEST_LOG_RATIO = 20.0


class PpoSettings(AlgorithmSettings):
    """PPO with chain-of-thought weighting (RL4VLM, arXiv 2405.10292). Defaults are the published figures for cards."""

    discount: Probability = Field(0.9, description="γ.")
    gae_lambda: Probability = Field(0.95, description="λ of generalised advantage estimation.")
    clip: PositiveFloat = Field(0.1, description="Clip range of the ratio and of the value.")
    value_coefficient: NonNegative = Field(0.5, description="Weight of the value loss.")
    value_gradient: bool = Field(True, description="Let the value loss train the trunk too.")
    thought_weight: NonNegative = Field(0.5, description="λ on thought tokens (cards 0.5, ALFWorld 0.2).")
    ratio_limit: PositiveFloat = Field(
        10.0, description="Where a ratio in the minibatch exceeds this, only the clipped surrogate is used."
    )
    normalize_advantages: bool = Field(True, description="Zero mean, unit deviation over the batch.")


class Ppo(Algorithm):
    """The algorithm: targets of a batch of episodes, and the loss of some of its steps."""

    name = "ppo"
    Settings = PpoSettings
    needs = ("response_ids", "behaviour_logprobs")
    settings: PpoSettings

    @property
    def value_gradient(self) -> bool:
        return self.settings.value_gradient

    def targets(self, trajectories: TrajectoryBatch, evaluation: Evaluation) -> Targets:
        """Per step `advantages`, `returns` and `old_values`, of whole episodes.

        How an episode ends decides what follows its last step: nothing if it terminated; the value of the final
        observation if it was cut off. If its environment failed, the outcome of that last step is unknown, which is
        neither a reward of zero nor an end: the step's value stands in for its return, so that its own advantage is 0
        and the steps before it count on what the critic expected there.
        """
        settings, values, final_values = self.settings, evaluation.values, evaluation.final_values
        rewards = trajectories.column("reward")
        terminated = trajectories.column("terminated")
        advantages = np.zeros(len(trajectories))
        known = np.ones(len(trajectories), bool)
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
        returns = advantages + values
        if settings.normalize_advantages and known.any():
            spread = advantages[known].std()
            advantages = np.where(known, (advantages - advantages[known].mean()) / (spread + 1e-8), 0.0)
        variance = returns[known].var() if known.any() else 0.0
        explained = 1 - (returns - values)[known].var() / variance if variance > 0 else np.nan
        columns = {"advantages": advantages, "returns": returns, "old_values": values}
        return Targets(
            per_step={name: column.astype(np.float32) for name, column in columns.items()},
            metrics={
                "explained_variance": float(explained),
                "return_mean": float(returns.mean()),
                "value_mean": float(values.mean()),
            },
        )

    def loss(self, output: PolicyOutput, batch: TokenBatch) -> tuple[Tensor, dict[str, float]]:
        """The clipped surrogate, the value loss and the soft term; see `Algorithm.loss`."""
        import torch

        settings = self.settings
        advantages, returns, old_values = (batch.targets[name] for name in ("advantages", "returns", "old_values"))
        new = self.step_logprob(output.logprobs, batch)
        old = self.step_logprob(batch.behaviour_logprobs, batch)
        ratio = (new - old).clamp(max=LARGEST_LOG_RATIO).exp()
        free = ratio * advantages
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip) * advantages
        # "Where a ratio in the minibatch exceeds the limit": published with minibatches of one step, so each its own.
        surrogate = torch.where(ratio > settings.ratio_limit, clipped, torch.minimum(free, clipped))

        change = (output.values - old_values).clamp(-settings.clip, settings.clip)
        value_error = torch.maximum((output.values - returns).square(), (old_values + change - returns).square())
        bonus = self.entropy(output.entropy, batch)
        per_step = -surrogate + settings.value_coefficient * 0.5 * value_error - bonus
        weight = batch.sample_weight
        with torch.no_grad():
            drift = (output.logprobs - batch.behaviour_logprobs).masked_fill(~batch.response_mask, 0.0)
            per_step_metrics = {
                "policy_loss": -surrogate,
                "value_loss": 0.5 * value_error,
                "entropy": mean_weighted_entropy("uniform", output.entropy, batch.influence, batch.response_mask),
                "weighted_entropy": mean_weighted_entropy(
                    "counterfactual", output.entropy, batch.influence, batch.response_mask
                ),
                "entropy_bonus": bonus,
                "approx_kl": (drift.clamp(max=LARGEST_LOG_RATIO).exp() - 1 - drift).sum(-1),
                "clip_fraction": ((ratio - 1).abs() > settings.clip).float(),
            }
            metrics = {name: float((values * weight).sum()) for name, values in per_step_metrics.items()}
            metrics["samples"] = float(weight.sum())
            metrics["ratio_max"] = float((ratio * (weight > 0)).max())
        return (per_step * weight).sum(), metrics

    def step_logprob(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """λ · Σ thought tokens + Σ action tokens: float32 (B, R) nats -> (B,)."""
        token_weight = logprobs.new_full(logprobs.shape, self.settings.thought_weight)
        token_weight = token_weight.masked_fill(batch.action_mask, 1.0)
        return (logprobs * token_weight).masked_fill(~batch.response_mask, 0.0).sum(-1)
