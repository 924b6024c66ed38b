"""What a learner rank is told: plain dataclasses, so that a rank can be started by anything that can pickle them.

The run's pydantic config is mapped onto these by `cluster/`; nothing here reads a file or the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from actors.serving.weight_transfer import Transport
    from learner.algorithms.ppo import PpoOptions
    from learner.model import LoraOptions


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the parameters are held and stepped."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    threads: int = 1  # CPU threads of one rank
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8  # of AdamW; a large one damps the steps of weights whose gradients are small
    gradient_clip: float = 0.01  # largest gradient norm over all parameters
    collective_deadline_s: float = 600.0  # how long a rank waits for the others in one exchange

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, not {self.zero_stage}")
        if self.gradient_clip <= 0:
            raise ValueError(f"gradient_clip must be greater than 0, not {self.gradient_clip}")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Course of the learning rate over the updates of a run."""

    learning_rate: float = 1e-5  # at update 0
    final_learning_rate: float = 1e-9  # at the last update (cosine)
    value_learning_rate: float | None = None  # of the value head at update 0; None: that of the policy
    shape: Literal["cosine", "constant"] = "cosine"
    total_updates: int = 25

    @property
    def value_rate(self) -> float:
        """Rate of the value head at update 0."""
        return self.learning_rate if self.value_learning_rate is None else self.value_learning_rate


@dataclass(frozen=True, kw_only=True)
class SupervisedOptions:
    """Supervised fine-tuning on demonstrations: linear warm-up, then linear decay to zero."""

    steps: int = 250
    batch: int = 32  # demonstrations per optimizer step, over all ranks
    learning_rate: float = 3e-3  # at the peak
    warm_up_share: float = 0.05  # of the steps
    informative_weight: float = 1.0  # loss weight of informative tokens (learner.supervised.loss) in the first part
    informative_share: float = 0.6  # that first part, as a share of the steps


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """How new weights leave the learner."""

    transport: Transport
    run: str  # unique among the runs of the machine
    fallback_folder: Path  # where shared memory has no room


@dataclass(frozen=True, kw_only=True)
class LearnerOptions:
    """All that a rank must know."""

    model_path: str  # folder or hub name of the VLM to start from
    value_hidden: tuple[int, ...]
    algorithm: PpoOptions
    epochs: int = 4  # passes over the batch in one update
    lora: LoraOptions | None = None
    gradient_checkpointing: bool = False
    value_gradient: bool = True  # the value loss trains the trunk too
    seed: int = 1
    temperature: float = 1.0  # of the distribution that was sampled from
    minibatch: int = 128  # steps per optimizer step, over all ranks
    micro_batch: int = 1  # steps per forward pass of one rank; the rest is accumulated
    token_chunk: int = 1024  # response tokens whose logits exist at once
    engine: EngineOptions = field(default_factory=EngineOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    publishing: PublishOptions | None = None  # None: a learner without policy servers (warm start)

    def __post_init__(self) -> None:
        for name in ("minibatch", "micro_batch", "token_chunk", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
