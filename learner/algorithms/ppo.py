"""PPO over utterances with chain-of-thought weighting (RL4VLM, arXiv 2405.10292), with the soft term of CoSo.

A step's log-probability is λ · (thought tokens) + (action tokens). An utterance in which no action part is found is all
thoughts. The ratio is taken against the log-probabilities that were sampled from, so data made by older weights is
weighted as importance sampling has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.trajectory import TrajectoryBatch
from learner.algorithms.advantages import gae
from learner.algorithms.entropy import EntropyMode, mean_weighted_entropy
from learner.batch import TokenBatch
from learner.model import PolicyOutput

#: A ratio of e^20 is far beyond any limit, and finite: an infinite one would make its gradient 0 · inf.
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class PpoOptions:
    """Defaults are the published figures for the card games."""

    discount: float = 0.9  # γ
    gae_lambda: float = 0.95
    clip: float = 0.1  # of the ratio around 1, and of the value around its old one
    value_coefficient: float = 0.5
    thought_weight: float = 0.5  # λ
    ratio_limit: float = 10.0  # a step whose ratio exceeds this is left to the clipped surrogate alone
    normalize_advantages: bool = True
    entropy_mode: EntropyMode = "counterfactual"
    entropy_coefficient: float = 1.0  # α


@dataclass(frozen=True)
class StepTargets:
    """What the steps of a batch are trained towards."""

    advantages: np.ndarray  # float32 (N,), normalised over the batch if so configured
    returns: np.ndarray  # float32 (N,), in units of reward
    explained_variance: float  # 1 − var(returns − values) / var(returns); NaN where the returns do not vary


class Ppo:
    """The algorithm: targets of a batch of episodes, and the loss of some of its steps."""

    def __init__(self, options: PpoOptions) -> None:
        self.options = options

    def targets(self, trajectories: TrajectoryBatch, values: np.ndarray, final_values: np.ndarray) -> StepTargets:
        """Advantages and returns of whole episodes.

        values (N,): V of every step's state; final_values (N,): V of the observation after a step, NaN where the
        trajectory has none. How an episode ends decides what follows its last step: nothing if it terminated; the
        value of the final observation if it was cut off; and if its environment failed, the outcome of that last step
        is unknown, which is neither a reward of zero nor an end: the step's value stands in for its return, so that
        its own advantage is 0 and the steps before it count on what the critic expected there.
        """
        options = self.options
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
            advantages[steps] = gae(rewards[steps], values[steps], bootstrap, options.discount, options.gae_lambda)
        returns = advantages + values
        if options.normalize_advantages and known.any():
            spread = advantages[known].std()
            advantages = np.where(known, (advantages - advantages[known].mean()) / (spread + 1e-8), 0.0)
        variance = returns[known].var() if known.any() else 0.0
        explained = 1 - (returns - values)[known].var() / variance if variance > 0 else np.nan
        return StepTargets(advantages.astype(np.float32), returns.astype(np.float32), float(explained))

    def loss(self, output: PolicyOutput, batch: TokenBatch) -> tuple[Tensor, dict[str, float]]:
        """(loss, metrics) of the batch's steps: sums over steps, each times its `sample_weight`.

        The caller divides the loss by the steps of the whole minibatch, over all micro-batches and ranks, so that how
        a minibatch is cut does not change its gradient. Metrics are sums too (divide by `samples`), but for
        `ratio_max`, of which the largest counts. Needs the batch's advantages, returns and old values.
        """
        options = self.options
        if batch.advantages is None or batch.returns is None or batch.old_values is None:
            raise ValueError("PPO needs the batch's advantages, returns and old_values; see Ppo.targets")
        new = self.step_logprob(output.logprobs, batch)
        old = self.step_logprob(batch.behaviour_logprobs, batch)
        ratio = (new - old).clamp(max=LARGEST_LOG_RATIO).exp()
        free = ratio * batch.advantages
        clipped = ratio.clamp(1 - options.clip, 1 + options.clip) * batch.advantages
        # "Where a ratio in the minibatch exceeds the limit": published with minibatches of one step, so each its own.
        surrogate = torch.where(ratio > options.ratio_limit, clipped, torch.minimum(free, clipped))

        change = (output.values - batch.old_values).clamp(-options.clip, options.clip)
        value_error = torch.maximum(
            (output.values - batch.returns).square(), (batch.old_values + change - batch.returns).square()
        )
        bonus = options.entropy_coefficient * mean_weighted_entropy(
            options.entropy_mode, output.entropy, batch.influence, batch.response_mask
        )
        per_step = -surrogate + options.value_coefficient * 0.5 * value_error - bonus
        weight = batch.sample_weight
        with torch.no_grad():
            drift = (output.logprobs - batch.behaviour_logprobs).masked_fill(~batch.response_mask, 0.0)
            per_step_metrics = {
                "policy_loss": -surrogate,
                "value_loss": 0.5 * value_error,
                "entropy": self._entropy("uniform", output, batch),
                "weighted_entropy": self._entropy("counterfactual", output, batch),
                "entropy_bonus": bonus,
                "approx_kl": (drift.clamp(max=LARGEST_LOG_RATIO).exp() - 1 - drift).sum(-1),
                "clip_fraction": ((ratio - 1).abs() > options.clip).float(),
            }
            metrics = {name: float((values * weight).sum()) for name, values in per_step_metrics.items()}
            metrics["samples"] = float(weight.sum())
            metrics["ratio_max"] = float((ratio * (weight > 0)).max())
        return (per_step * weight).sum(), metrics

    def step_logprob(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """λ · Σ thought tokens + Σ action tokens: float32 (B, R) nats -> (B,)."""
        token_weight = torch.where(batch.action_mask, 1.0, self.options.thought_weight)
        return (logprobs * token_weight).masked_fill(~batch.response_mask, 0.0).sum(-1)

    @staticmethod
    def _entropy(mode: EntropyMode, output: PolicyOutput, batch: TokenBatch) -> Tensor:
        return mean_weighted_entropy(mode, output.entropy, batch.influence, batch.response_mask)
