"""The settings of the learner, its algorithms and the warm start. Defaults are the published figures, if any."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from envs.settings import Count, NonNegative, Probability, Section


class LoraSettings(Section):
    """Low-rank adapters (peft) on all linear layers of the language model."""

    rank: PositiveInt = Field(128, description="Rank r.")
    alpha: PositiveFloat = Field(256.0, description="Scale alpha (the update is alpha / r · B A).")
    dropout: Probability = Field(0.05, description="Dropout on the adapter's input.")


class LearnerSettings(Section):
    """The DeepSpeed learner."""

    ranks: PositiveInt = Field(1, description="Learner processes (Ray actors), one per GPU.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where the ranks run.")
    threads: PositiveInt = Field(1, description="CPU threads per rank.")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(0, description="DeepSpeed ZeRO stage.")
    lora: LoraSettings | None = Field(None, description="Train adapters instead of all weights.")
    learning_rate: PositiveFloat = Field(1e-5, description="Start of the schedule.")
    final_learning_rate: NonNegative = Field(1e-9, description="End of the schedule.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Course of the learning rate.")
    value_learning_rate: PositiveFloat | None = Field(
        None, description="Learning rate of the value head; null: that of the policy."
    )
    weight_decay: NonNegative = Field(0.0, description="AdamW weight decay.")
    betas: tuple[Probability, Probability] = Field((0.9, 0.999), description="AdamW betas.")
    epsilon: PositiveFloat = Field(1e-8, description="AdamW ε; a large one damps the steps of rarely moved weights.")
    gradient_clip: PositiveFloat = Field(0.01, description="Largest gradient norm.")
    minibatch: PositiveInt = Field(128, description="Steps per optimizer step, over all ranks.")
    micro_batch: PositiveInt = Field(1, description="Steps per forward pass of one rank; the rest is accumulated.")
    token_chunk: PositiveInt = Field(1024, description="Tokens whose logits exist at once.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    update_deadline_s: PositiveFloat = Field(3600.0, description="Deadline of one update, seconds.")
    start_deadline_s: PositiveFloat = Field(600.0, description="Deadline for the ranks to start, seconds.")

    @model_validator(mode="after")
    def _accumulation_is_whole(self) -> LearnerSettings:
        if self.minibatch % (self.micro_batch * self.ranks):
            raise ValueError(
                f"learner.minibatch ({self.minibatch}) must be a multiple of micro_batch × ranks "
                f"({self.micro_batch} × {self.ranks}), so that gradients accumulate a whole number of times"
            )
        return self


class PpoSettings(Section):
    """PPO with chain-of-thought weighting (RL4VLM, arXiv 2405.10292)."""

    name: Literal["ppo"] = "ppo"
    epochs: PositiveInt = Field(4, description="Passes over the batch.")
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


class EntropySettings(Section):
    """The entropy bonus of soft RL: −coefficient · mean over the batch of Σ_i B_i H_i / n, added to the loss."""

    mode: Literal["none", "uniform", "counterfactual"] = Field(
        "counterfactual", description="none: no bonus; uniform: B_i = 1; counterfactual: B_i = influence (CoSo)."
    )
    coefficient: NonNegative = Field(1.0, description="α.")


class WarmStartSettings(Section):
    """Supervised fine-tuning on expert demonstrations, from a small model made on the spot or from `model.path`."""

    output: str = Field("models/default", description="Folder the warm-started model is written to.")
    make_model: bool = Field(
        True, description="Make the small default model with its own tokenizer; false: start from `model.path`."
    )
    hidden: PositiveInt = Field(128, description="Width of the small model's text layers.")
    layers: PositiveInt = Field(2, description="Text layers of the small model.")
    image_size: PositiveInt = Field(64, description="Input size of the small model's pictures, pixels.")
    demonstrations_from: str = Field(
        "", description="Folder that `coso demos` wrote, to learn from; empty: collect as the next three keys say."
    )
    demonstrations: PositiveInt = Field(1500, description="Expert steps to collect.")
    noise: Probability = Field(
        0.0, description="Share of demonstrations whose action is not the expert's, which leaves RL something to do."
    )
    habit: str = Field("", description="The action taken in those; empty: a uniformly random one.")
    vision_steps: Count = Field(0, description="Steps of vision pre-training on the environment's state labels.")
    vision_learning_rate: PositiveFloat = Field(2e-3, description="Its learning rate.")
    steps: PositiveInt = Field(250, description="Optimizer steps of supervised fine-tuning.")
    batch: PositiveInt = Field(32, description="Demonstrations per step.")
    learning_rate: PositiveFloat = Field(3e-3, description="Peak learning rate (linear warm-up, then linear decay).")
    informative_weight: PositiveFloat = Field(
        1.0, description="Loss weight of tokens that the two before them do not determine, in the first part."
    )
    informative_share: Probability = Field(0.6, description="That first part, as a share of the steps.")
