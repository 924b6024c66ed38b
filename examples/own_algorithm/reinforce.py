"""REINFORCE with a running baseline (Williams 1992), as an algorithm of your own.

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
    baseline: float | None = None  # running mean of the returns

    def targets(self, trajectories: TrajectoryBatch, evaluation: Evaluation) -> Targets:
        """Per step `advantages`: G_t = r_t + γ G_{t+1}, less the running mean of G."""
        rewards = trajectories.column("reward")
        returns = np.zeros(len(rewards), np.float32)
        for episode in trajectories.episode_slices():
            following = 0.0
            for step in reversed(range(episode.start, episode.stop)):
                returns[step] = following = rewards[step] + self.settings.discount * following
        mean = float(returns.mean())
        self.baseline = mean if self.baseline is None else 0.9 * self.baseline + 0.1 * mean
        return Targets(per_step={"advantages": returns - np.float32(self.baseline)}, metrics={"return_mean": mean})

    def loss(self, output: PolicyOutput, batch: TokenBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """−A · log π(utterance | state) − the soft term, of each step."""
        policy = -batch.targets["advantages"] * output.logprobs.sum(-1)
        bonus, metrics = self.entropy(output.entropy, batch)
        return {"policy": policy, "entropy": -bonus}, metrics | {"policy_loss": policy.detach()}

    def state(self) -> dict[str, float]:
        return super().state() | ({} if self.baseline is None else {"baseline": self.baseline})

    def load(self, state: dict[str, float]) -> None:
        super().load(state)
        self.baseline = state.get("baseline")
