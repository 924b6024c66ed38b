"""What an algorithm is: settings, the columns it needs, targets for a batch, and a loss for some of its steps.

An algorithm is one file in this folder (or a module of your own, see `learner.algorithms.registry`). It sees
trajectories, numbers and tensors, and never DeepSpeed, Ray or a file. Its module is imported with the config, so it
imports torch inside its methods only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, PositiveInt

from envs.settings import Section

if TYPE_CHECKING:
    from torch import Tensor

    from actors.trajectory import TrajectoryBatch
    from learner.algorithms.entropy import EntropyBonus
    from learner.policy.batch import TokenBatch
    from learner.policy.model import PolicyOutput


class AlgorithmSettings(Section):
    """What the settings of every algorithm have. A subclass adds its own."""

    name: str = Field("ppo", description="Which algorithm: its name, or `module:Class` for one of your own.")
    epochs: PositiveInt = Field(4, description="Passes over the batch.")


@dataclass(frozen=True)
class Evaluation:
    """What the learner's model says of a batch of N steps before the update, without dropout."""

    logprobs: Sequence[np.ndarray]  # float32 (n,) per step: nats, of the response tokens
    values: np.ndarray  # float32 (N,): V of the state of every step
    final_values: np.ndarray  # float32 (N,): V of the observation after a step, NaN where the trajectory has none
    trained: np.ndarray  # bool (N,): steps that the loss will see; the others are too old and give context only


@dataclass(frozen=True)
class Targets:
    """What the steps of a batch are trained towards. The rank cuts the columns as it cuts the batch."""

    per_step: dict[str, np.ndarray] = field(default_factory=dict)  # name -> float32 (N,)
    per_token: dict[str, Sequence[np.ndarray]] = field(default_factory=dict)  # name -> float32 (n,) per step
    metrics: dict[str, float] = field(default_factory=dict)  # of the whole batch
    #: Before the passes the value head is made to say gain · v + shift where it said v: for an algorithm that changes
    #: the unit of its values, and wants those learnt so far to stay as they are.
    value_gain: float = 1.0
    value_shift: float = 0.0


class Algorithm(ABC):
    """One algorithm with its settings. The same on every rank: it draws no random numbers."""

    #: What `algorithm.name` says to select it.
    name: ClassVar[str]
    #: Its section of the config.
    Settings: ClassVar[type[AlgorithmSettings]]
    #: Columns of `actors.trajectory.STEP_SCHEMA` that must not be null, checked before an update.
    needs: ClassVar[tuple[str, ...]] = ("response_ids",)

    def __init__(self, settings: AlgorithmSettings, entropy: EntropyBonus) -> None:
        """entropy: the soft term, which the loss subtracts."""
        self.settings = settings
        self.entropy = entropy

    @property
    def value_gradient(self) -> bool:
        """Whether the loss of the values trains the trunk too."""
        return True

    @abstractmethod
    def targets(self, trajectories: TrajectoryBatch, evaluation: Evaluation) -> Targets:
        """The targets of whole episodes, computed once an update."""

    @abstractmethod
    def loss(self, output: PolicyOutput, batch: TokenBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(parts, metrics) of the B steps of a micro-batch: the loss is the sum of its parts, each float32 (B,).

        `batch.targets` holds the columns that `targets` returned: float32 (B,) per step, (B, R) per token. Metrics are
        float32 (B,) without gradient. The rank takes the mean over the minibatch's steps, over all micro-batches and
        ranks, so that how a minibatch is cut does not change its gradient; of a metric that ends in `_max`, the
        largest.
        """

    @property
    def may_end_early(self) -> bool:
        """Whether `enough` has to be asked."""
        return False

    def enough(self, step_metrics: dict[str, float]) -> bool:
        """Whether an update's remaining passes are left out. step_metrics: means of an optimizer step's metrics."""
        return False

    def state(self) -> dict[str, float]:
        """What a checkpoint must remember of the algorithm besides the model."""
        return self.entropy.state()

    def load(self, state: dict[str, float]) -> None:
        """Go on from what `state` returned."""
        self.entropy.load(state)
