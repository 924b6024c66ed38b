"""REINFORCE with a running baseline (Williams 1992), as an algorithm of one's own.

    coso train configs/numberline.yaml algorithm.name=examples.own_algorithm.reinforce:Reinforce

To make it one of the built-in algorithms, put this file into `learner/algorithms/`; then `algorithm.name=reinforce`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from envs.settings import Probability
from learner.algorithms.base import Algorithm, AlgorithmSettings, Evaluation, Targets

if TYPE_CHECKING:
    from torch import Tensor

    from actors.trajectory import TrajectoryBatch
    from learner.policy.batch import TokenBatch
    from learner.policy.model import PolicyOutput


class ReinforceSettings(AlgorithmSettings):
    """REINFORCE: every step's log-probability times its return above the mean return of the batch."""

    discount: Probability = Field(0.9, description="γ.")


class Reinforce(Algorithm):
    """No critic, no clip: run it with `epochs` 1 and data that is not old."""

    name = "reinforce"
    Settings = ReinforceSettings
    settings: ReinforceSettings

    def targets(self, trajectories: TrajectoryBatch, evaluation: Evaluation) -> Targets:
        """Per step `advantages`: G_t = r_t + γ G_{t+1}, less the mean of the batch."""
        rewards = trajectories.column("reward")
        returns = np.zeros(len(rewards), np.float32)
        for episode in trajectories.episode_slices():
            following = 0.0
            for step in reversed(range(episode.start, episode.stop)):
                returns[step] = following = rewards[step] + self.settings.discount * following
        baseline = returns.mean()
        return Targets(per_step={"advantages": returns - baseline}, metrics={"return_mean": float(baseline)})

    def loss(self, output: PolicyOutput, batch: TokenBatch) -> tuple[Tensor, dict[str, float]]:
        """−A · log π(utterance | state) − the soft term, summed over the steps."""
        weight = batch.sample_weight
        policy_loss = -batch.targets["advantages"] * output.logprobs.sum(-1)
        loss = ((policy_loss - self.entropy(output.entropy, batch)) * weight).sum()
        return loss, {"policy_loss": float((policy_loss.detach() * weight).sum()), "samples": float(weight.sum())}
