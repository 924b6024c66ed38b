"""The settings of the learner, its algorithms and the warm start. Defaults are the published figures, if any."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from actors.settings import AdapterTarget
from envs.settings import Count, NonNegative, Probability, Section, Share

#: CPU threads of a rank on cuda, at most, where the config says nothing.
MOST_THREADS = 8

EntropyMode = Literal["none", "uniform", "counterfactual", "action_tokens", "random", "token_entropy"]


class LoraSettings(Section):
    """Low-rank adapters (peft); the output head has none. Published figures: RL4VLM, arXiv 2405.10292.

    In bfloat16 the optimizer keeps and moves a float32 copy of them; forward passes use it rounded to bfloat16, in the
    learner as in vLLM.
    """

    rank: PositiveInt = Field(128, description="Rank r.")
    alpha: PositiveFloat = Field(256.0, description="Scale alpha (the update is alpha / r · B A).")
    dropout: Probability = Field(0.05, description="Dropout on the adapter's input.")
    target: AdapterTarget = Field(
        "language_model",
        description="language_model: every linear layer of the text decoder; all-linear: also those of the vision "
        "tower and the connector.",
    )
    serving: Literal["adapters", "merged"] = Field(
        "adapters",
        description="adapters: vLLM applies the adapters beside the model's own weights, as the learner does, and only "
        "they travel; merged: they are added to the weights, and all weights travel (for models whose adapters vLLM "
        "does not apply). In bfloat16 that rounds most of a small update away; the learner then computes with the "
        "rounded weights, too.",
    )


class LearnerSettings(Section):
    """The DeepSpeed learner."""

    ranks: PositiveInt = Field(1, description="Learner processes (Ray actors), one per GPU.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where the ranks run.")
    threads: PositiveInt | None = Field(
        None,
        description="CPU threads of a rank. With two and more it processes so many images at once, and makes the next "
        "micro-batch beside the passes. null: 1 on cpu; on cuda the machine's CPUs by the number of ranks, at most 8.",
    )
    gpu_share: Share = Field(1.0, description="Share of a GPU that one rank takes; below 1, others may share it.")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(0, description="DeepSpeed ZeRO stage.")
    offload_optimizer: bool = Field(
        False,
        description="Keep the optimizer's state in host memory except during an update, for others on a shared GPU: 8 "
        "bytes per trained parameter in float32, 12 in bfloat16.",
    )
    lora: LoraSettings | None = Field(None, description="Train adapters instead of all weights.")
    learning_rate: PositiveFloat = Field(1e-5, description="Start of the schedule.")
    final_learning_rate: NonNegative = Field(1e-9, description="End of the schedule.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Course of the learning rate.")
    schedule_updates: PositiveInt | None = Field(
        None,
        description="Updates that the schedules of learning rate and entropy target span; later ones stay at the end. "
        "null: `training.updates`. `coso resume --updates` fixes it, so that no update's rate changes.",
    )
    value_learning_rate: PositiveFloat | None = Field(
        None,
        description="Learning rate of the value head, the same in all updates: returns change as long as the policy "
        "does. null: that of the policy, with its schedule.",
    )
    weight_decay: NonNegative = Field(0.0, description="AdamW weight decay.")
    betas: tuple[Probability, Probability] = Field((0.9, 0.999), description="AdamW betas.")
    epsilon: PositiveFloat = Field(1e-8, description="AdamW ε; a large one damps the steps of rarely moved weights.")
    gradient_clip: PositiveFloat = Field(0.01, description="Largest gradient norm.")
    minibatch: PositiveInt = Field(
        128, description="Steps per optimizer step, over all ranks; a batch is cut evenly, so about as many."
    )
    micro_batch: PositiveInt = Field(1, description="Steps per forward pass of one rank; the rest is accumulated.")
    micro_tokens: PositiveInt | None = Field(
        None,
        description="Tokens per forward pass of one rank, padding included, so that a pass takes more short steps than "
        "long ones: set it to what memory has room for, and micro_batch to more steps than that. null: no bound.",
    )
    token_chunk: PositiveInt = Field(1024, description="Tokens whose logits exist at once.")
    image_cache_bytes: Annotated[int, Field(ge=0)] = Field(
        4 << 30,
        description="Processed images of 256 KiB and more that a rank keeps, in files without names under $TMPDIR, "
        "bytes. With room for its share of two batches, it processes each image once.",
    )
    feature_cache_bytes: Count = Field(
        2 << 30,
        description="Host memory of a rank for what a vision tower made of pictures, bytes; 0: none. A tower that is "
        "not trained (LoRA on the language model) is run once per picture, as far as this goes. Not under ZeRO-3.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    update_deadline_s: PositiveFloat = Field(
        3600.0,
        description="The ranks are given up after so long a silence, seconds: no forward pass, no call answered. "
        "A whole update may take longer.",
    )
    start_deadline_s: PositiveFloat = Field(600.0, description="Deadline for the ranks to start, seconds.")
    collective_deadline_s: PositiveFloat = Field(
        600.0, description="How long a rank waits for the others in one exchange, seconds."
    )

    @property
    def rank_threads(self) -> int:
        """CPU threads of a rank on this machine, with the default decided."""
        if self.threads is not None or self.device == "cpu":
            return self.threads or 1
        return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // self.ranks))

    @model_validator(mode="after")
    def _ranks_do_not_share_a_gpu(self) -> LearnerSettings:
        if self.ranks > 1 and self.gpus and self.gpu_share <= 0.5:
            raise ValueError(
                f"learner.ranks {self.ranks} with learner.gpu_share {self.gpu_share:g}: two ranks might get one GPU, "
                "which NCCL refuses. Set learner.gpu_share above 0.5"
            )
        return self

    @property
    def gpus(self) -> float:
        """GPUs that one rank takes."""
        return self.gpu_share if self.device == "cuda" else 0.0

    @property
    def served_adapters(self) -> LoraSettings | None:
        """The adapters that engines apply, so that nothing else is published; None where they are sent all weights."""
        return self.lora if self.lora is not None and self.lora.serving == "adapters" else None


class EntropySettings(Section):
    """The entropy bonus of soft RL: coefficient · mean over the batch of Σ_i B_i H_i / n, taken from the loss. It is
    in nats per token of the answer: where d of n tokens decide (B_i = 1), α per deciding token is α · d / n."""

    mode: EntropyMode = Field(
        "counterfactual",
        description="What weighs a token's entropy. none: no bonus; uniform: B_i = 1; counterfactual: B_i = influence "
        "(CoSo); and controls: action_tokens: 1 on the part that the parser reads; random: influence, shuffled within "
        "the answer; token_entropy: the policy's own entropy, over the answer's largest.",
    )
    coefficient: NonNegative = Field(1.0, description="α, or where it starts if `entropy.target` is set.")
    weighting: Literal["utterance_max", "mass"] = Field(
        "utterance_max",
        description="utterance_max: weights as they are (the largest influence of an answer is 1); mass: scaled to sum "
        "to the number of tokens, so that modes can be compared at equal weight.",
    )
    target: PositiveFloat | None = Field(
        None,
        description="Tune α so that the weighted entropy Σ_i B_i H_i / n stays here, nats per token; null: α is fixed.",
    )
    final_target: PositiveFloat | None = Field(
        None, description="Where the target ends, on a straight line over the updates; null: it stays."
    )
    target_rate: PositiveFloat = Field(
        0.03, description="How much log α moves in an optimizer step, per relative distance from the target."
    )
    coefficient_min: PositiveFloat = Field(1e-4, description="Least α while it is tuned.")
    coefficient_max: PositiveFloat = Field(100.0, description="Largest α while it is tuned.")
    gradient_every: Count = Field(
        5, description="Compare the gradients of entropy and policy every n-th update (ZeRO below 3); 0: never."
    )

    @property
    def needs_influence(self) -> bool:
        """Whether the weights are made of influence, so that answers have to be scored."""
        return self.mode in ("counterfactual", "random")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> EntropySettings:
        if self.target is not None and not self.coefficient_min <= self.coefficient <= self.coefficient_max:
            raise ValueError(
                f"entropy.coefficient ({self.coefficient:g}) must lie between entropy.coefficient_min "
                f"({self.coefficient_min:g}) and entropy.coefficient_max ({self.coefficient_max:g})"
            )
        return self


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
