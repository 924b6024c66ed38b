"""The run's settings: pydantic models, importable without torch, Ray or vLLM. Unknown keys are fatal.

`docs/config.md` is generated from this file (`coso config --docs`), so a field's description is its documentation.
Defaults are the published figures where there are any (PPO with chain-of-thought weighting: RL4VLM, arXiv 2405.10292;
CoSo: arXiv 2505.03792); a config file under `configs/` states what a smaller machine or model needs instead.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1, and YAML takes yes and on for true.
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise PydanticCustomError("bool_instead", "Input should not be true or false (nor yes, no, on, off)")
        return value


class EnvironmentConfig(Section):
    """Which environment, and what happens when one is slow, hangs or dies."""

    id: str = Field("coso/NumberLine-v0", description="gymnasium id; `module:Name-v0` imports `module` first.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the environment.")
    deadline_s: PositiveFloat = Field(30.0, description="Deadline of every reset and step, seconds.")
    start_deadline_s: PositiveFloat = Field(60.0, description="Deadline for an environment to start, seconds.")
    restart_backoff_s: NonNegative = Field(
        0.5, description="Wait before the first restart, seconds; doubles with every failure in a row."
    )
    quarantine_after: PositiveInt = Field(
        5, description="Failures in a row after which an environment is left alone for `quarantine_s`."
    )
    quarantine_s: NonNegative = Field(60.0, description="How long a quarantined environment rests, seconds.")


class ModelConfig(Section):
    """The policy: any Hugging Face vision-language model with a chat template."""

    path: str = Field(
        "models/default", description="Folder or hub name of the model to start from (a warm start writes one)."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of engine and learner.")
    value_hidden: tuple[PositiveInt, ...] = Field(
        (1024, 512), description="Hidden widths of the value head (MLP with ReLU on the last prompt token)."
    )


class RolloutConfig(Section):
    """How many environments run, and how answers are sampled."""

    workers: PositiveInt = Field(1, description="Rollout workers (Ray actors).")
    envs_per_worker: PositiveInt = Field(8, description="Environments each worker drives at once.")
    temperature: PositiveFloat = Field(1.0, description="Sampling temperature (published for cards: 0.2).")
    max_new_tokens: PositiveInt = Field(256, description="Longest answer, tokens.")
    stream_bytes: PositiveInt = Field(
        64 << 20, description="Trajectories waiting for the learner, bytes; full means that rollouts wait."
    )
    stall_deadline_s: PositiveFloat = Field(
        300.0, description="Longest wait for a batch of trajectories before the run stops with an error, seconds."
    )


class PolicyServerConfig(Section):
    """The vLLM engines that serve the policy."""

    replicas: PositiveInt = Field(1, description="Policy servers (Ray actors, one vLLM engine each).")
    tensor_parallel: PositiveInt = Field(1, description="GPUs each engine spreads over.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where the engines run.")
    max_model_len: PositiveInt = Field(1024, description="Longest prompt plus answer, tokens.")
    max_concurrent_requests: PositiveInt = Field(64, description="Requests an engine runs at once.")
    kv_cache_bytes: PositiveInt = Field(32 << 20, description="KV cache of a CPU engine, bytes.")
    gpu_memory_utilization: Probability = Field(0.85, description="Share of GPU memory an engine takes.")
    start_deadline_s: PositiveFloat = Field(300.0, description="Deadline for an engine to start, seconds.")
    generate_deadline_s: PositiveFloat = Field(120.0, description="Deadline of one answer, seconds.")

    @model_validator(mode="after")
    def _only_gpus_share_a_model(self) -> PolicyServerConfig:
        if self.tensor_parallel > 1 and self.device == "cpu":
            raise ValueError("policy_server.tensor_parallel > 1 needs policy_server.device cuda")
        return self


class WeightSyncConfig(Section):
    """How new weights reach the live engines."""

    transport: Literal["auto", "shared_memory", "object_store", "nccl", "gloo"] = Field(
        "auto",
        description="shared_memory: a file in the node's memory; object_store: through Ray, for several nodes; "
        "nccl: GPU to GPU; gloo: the same collective on CPU. auto: nccl on GPUs, else shared_memory on one node, "
        "else object_store.",
    )
    deadline_s: PositiveFloat = Field(120.0, description="Deadline for every server to swap, seconds.")
    check_every: Count = Field(
        1,
        description="After every n-th swap, compare a live engine's log-probabilities on one prompt with the "
        "learner's; 0: never.",
    )
    check_tolerance: PositiveFloat = Field(
        0.2,
        description="Largest |difference| of a log-probability in that check before the run stops (bfloat16 "
        "engines differ by about 0.01; a stale weight by 0.5 or more).",
    )


class ScmConfig(Section):
    """The structural causal model p(action | utterance), and how it is trained online."""

    hidden: PositiveInt = Field(128, description="Width.")
    layers: PositiveInt = Field(3, description="Transformer encoder layers.")
    heads: PositiveInt = Field(4, description="Attention heads.")
    feedforward: PositiveInt = Field(512, description="Feed-forward width.")
    max_tokens: PositiveInt = Field(512, description="Positions that are told apart; later ones share the last.")
    learning_rate: PositiveFloat = Field(1e-5, description="Adam learning rate.")
    pretrain_rounds: Count = Field(500, description="Rounds on the warm start's demonstrations, where there are any.")
    rounds: Count = Field(2, description="Rounds per update.")
    round_utterances: PositiveInt = Field(1024, description="Utterances sampled in a round.")
    minibatch: PositiveInt = Field(64, description="Utterances per optimizer step.")
    buffer_utterances: PositiveInt = Field(16384, description="Utterances remembered.")


class ScoringConfig(Section):
    """The scoring pool: how much each token influenced the executed action."""

    estimator: Literal["scm", "parser", "scm+parser", "uniform", "gradient"] = Field(
        "scm",
        description="scm: change of the causal model's probability of the action (published); parser: exact, parses "
        "the answer again without the token; scm+parser: the causal model where the answer no longer parses; "
        "gradient: one backward pass instead of one forward pass a token, an approximation; uniform: 1 everywhere.",
    )
    workers: PositiveInt = Field(1, description="Scoring workers (Ray actors).")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where they run.")
    precision: Literal["float32", "float64", "bfloat16"] = Field(
        "float64",
        description="Arithmetic of scoring; float32 is three times as fast and blurs the least influential tokens; "
        "bfloat16 is for GPUs, and blurs more.",
    )
    window: PositiveInt = Field(4, description="Tokens nulled together (published code 4, paper's text 1).")
    null_token: str | None = Field(
        None, description="Token that stands for nothing; null: the tokenizer's padding, unknown or end token."
    )
    batch_utterances: PositiveInt = Field(16, description="Distinct utterances a worker takes at a time, at most.")
    batch_tokens: PositiveInt = Field(
        1536,
        description="Tokens in one forward pass of the SCM: what fits a CPU core's cache; on a GPU 100,000 and more.",
    )
    longest_exact: PositiveInt = Field(
        1024,
        description="Longer utterances (the cost grows with the cube of their length) are scored by gradient, tokens.",
    )
    cache_bytes: Count = Field(64 << 20, description="Scores remembered, bytes; identical answers are scored once.")
    fidelity_utterances: Count = Field(
        16, description="Answers of every batch on which the estimate is compared with the parser; 0: none."
    )
    deadline_s: PositiveFloat = Field(300.0, description="Deadline for a batch of trajectories, seconds.")
    scm: ScmConfig = ScmConfig()


class LoraConfig(Section):
    """Low-rank adapters (peft) on all linear layers of the language model."""

    rank: PositiveInt = Field(128, description="Rank r.")
    alpha: PositiveFloat = Field(256.0, description="Scale alpha (the update is alpha / r · B A).")
    dropout: Probability = Field(0.05, description="Dropout on the adapter's input.")


class LearnerConfig(Section):
    """The DeepSpeed learner."""

    ranks: PositiveInt = Field(1, description="Learner processes (Ray actors), one per GPU.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where the ranks run.")
    threads: PositiveInt = Field(1, description="CPU threads per rank.")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(0, description="DeepSpeed ZeRO stage.")
    lora: LoraConfig | None = Field(None, description="Train adapters instead of all weights.")
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
    def _accumulation_is_whole(self) -> LearnerConfig:
        if self.minibatch % (self.micro_batch * self.ranks):
            raise ValueError(
                f"learner.minibatch ({self.minibatch}) must be a multiple of micro_batch × ranks "
                f"({self.micro_batch} × {self.ranks}), so that gradients accumulate a whole number of times"
            )
        return self


class PpoConfig(Section):
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


class EntropyConfig(Section):
    """The entropy bonus of soft RL: −coefficient · mean over the batch of Σ_i B_i H_i / n, added to the loss."""

    mode: Literal["none", "uniform", "counterfactual"] = Field(
        "counterfactual", description="none: no bonus; uniform: B_i = 1; counterfactual: B_i = influence (CoSo)."
    )
    coefficient: NonNegative = Field(1.0, description="α.")


class TrainingConfig(Section):
    """How long, and what is kept."""

    updates: PositiveInt = Field(25, description="Policy updates in all.")
    steps_per_update: PositiveInt = Field(512, description="Environment steps an update is made of (whole episodes).")
    evaluate_every: Count = Field(5, description="Evaluate after every n-th update; 0: only before and after.")
    evaluation_episodes: PositiveInt = Field(200, description="Held-out episodes of an evaluation.")
    evaluation_temperature: NonNegative = Field(0.0, description="Sampling temperature when evaluating; 0 is greedy.")
    checkpoint_every: PositiveInt = Field(5, description="Checkpoint after every n-th update.")
    keep_checkpoints: PositiveInt = Field(2, description="Checkpoints kept; older ones are removed.")


class WarmStartConfig(Section):
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


class LoggingConfig(Section):
    """Where metrics go besides `metrics.jsonl` and TensorBoard."""

    console: bool = Field(True, description="The live one-screen console (plain lines when not a terminal).")
    wandb_project: str | None = Field(
        None, description="Weights & Biases project; the key is read from the environment (WANDB_API_KEY)."
    )


class ClusterConfig(Section):
    """The Ray cluster and what each actor takes of it."""

    address: str | None = Field(
        None, description="Ray cluster to join (`auto` or host:port); null starts one on this machine, on loopback."
    )
    object_store_bytes: PositiveInt = Field(256 << 20, description="Object store of a local Ray, bytes.")
    learner_cpus: NonNegative = Field(1.0, description="CPUs of a learner rank.")
    policy_server_cpus: NonNegative = Field(1.0, description="CPUs of a policy server.")
    rollout_worker_cpus: NonNegative = Field(0.25, description="CPUs of a rollout worker.")
    scorer_cpus: NonNegative = Field(0.25, description="CPUs of a scoring worker.")
    oversubscribe: PositiveFloat = Field(
        2.0, description="Logical CPUs a local Ray offers per core: on one machine the stages take turns."
    )
    max_recoveries: Count = Field(
        20, description="Recoveries (of servers, scorers, workers and learner) after which the run gives up."
    )


class RunConfig(Section):
    """Everything a run is made of."""

    name: str = Field("numberline", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The run's name.")
    folder: str = Field("runs", description="Where run folders are made.")
    seed: Count = Field(1, description="Seed of everything.")
    mode: Literal["sync", "async"] = Field(
        "async", description="sync: lock-step and deterministic; async: all stages overlap."
    )
    max_policy_lag: Count = Field(
        1,
        description="async: data made by weights older than this many versions is not trained on; rollouts wait rather "
        "than make it.",
    )
    environment: EnvironmentConfig = EnvironmentConfig()
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    policy_server: PolicyServerConfig = PolicyServerConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    scoring: ScoringConfig = ScoringConfig()
    learner: LearnerConfig = LearnerConfig()
    algorithm: PpoConfig = PpoConfig()
    entropy: EntropyConfig = EntropyConfig()
    training: TrainingConfig = TrainingConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _transport_suits_devices(self) -> RunConfig:
        transport = self.weight_sync.transport
        if transport == "nccl" and "cpu" in (self.policy_server.device, self.learner.device):
            raise ValueError(
                "weight_sync.transport nccl needs policy_server.device and learner.device cuda; use gloo on CPUs"
            )
        if transport == "gloo" and self.policy_server.device == "cuda":
            raise ValueError("weight_sync.transport gloo is for CPUs; use nccl with policy_server.device cuda")
        return self
