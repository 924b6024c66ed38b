"""`RunConfig`: all settings of a run, composed of the stages' settings. Unknown keys are errors.

Defaults are the published values if there are any (PPO with chain-of-thought weighting: RL4VLM, arXiv 2405.10292;
CoSo: arXiv 2505.03792); the files in `configs/` set what a smaller machine or model needs.
"""

from __future__ import annotations

from math import log2
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from actors.serving.adapters.served import ENGINE_RANKS
from actors.settings import ModelSettings, PolicyServerSettings, RolloutSettings, WeightSyncSettings
from envs.settings import Count, EnvironmentSettings, NonNegative, Section
from learner.algorithms.registry import AnyAlgorithmSettings, default_algorithm
from learner.settings import EntropySettings, LearnerSettings, WarmStartSettings
from scoring.settings import ScoringSettings


class TrainingSettings(Section):
    """Length of training, evaluation and checkpoints."""

    updates: PositiveInt = Field(25, description="Number of policy updates.")
    steps_per_update: PositiveInt = Field(512, description="Environment steps per update (at least; whole episodes).")
    evaluate_every: Count = Field(5, description="Evaluate after every n-th update; 0: only before and after training.")
    evaluation_episodes: PositiveInt = Field(200, description="Held-out episodes per evaluation.")
    evaluation_temperature: NonNegative = Field(0.0, description="Sampling temperature in evaluations; 0 is greedy.")
    checkpoint_every: PositiveInt = Field(5, description="Checkpoint after every n-th update.")
    keep_checkpoints: PositiveInt = Field(2, description="Number of checkpoints to keep; older ones are removed.")


class LoggingSettings(Section):
    """Where metrics go besides `metrics.jsonl` and TensorBoard."""

    console: bool = Field(True, description="Show the live console (plain lines without a terminal).")
    wandb_project: str | None = Field(
        None, description="Weights & Biases project; the key is read from the environment (WANDB_API_KEY)."
    )


class ClusterSettings(Section):
    """The Ray cluster and the resources of each actor."""

    address: str | None = Field(
        None,
        description="Ray cluster to join (`auto` or host:port); null starts Ray on this machine, on loopback.",
    )
    object_store_bytes: PositiveInt = Field(256 << 20, description="Object store of a local Ray, bytes.")
    learner_cpus: NonNegative = Field(1.0, description="CPUs of a learner rank.")
    policy_server_cpus: NonNegative = Field(1.0, description="CPUs of a policy server.")
    rollout_worker_cpus: NonNegative = Field(0.25, description="CPUs of a rollout worker.")
    scorer_cpus: NonNegative = Field(0.25, description="CPUs of a scoring worker.")
    oversubscribe: PositiveFloat = Field(
        2.0, description="Logical CPUs that a local Ray offers per core. Above 1, since the stages take turns."
    )
    max_recoveries: Count = Field(
        20,
        description="Restarts of servers, scorers, workers and learner within `cluster.recovery_window_s` that a run "
        "survives.",
    )
    recovery_window_s: PositiveFloat = Field(3600.0, description="Time within which restarts are counted, seconds.")


class RunConfig(Section):
    """All settings of a run."""

    name: str = Field("numberline", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The run's name.")
    folder: str = Field("runs", description="Where run folders are made.")
    # PyTorch takes no larger seed; what takes only 32 bits is given a seed derived from this one.
    seed: int = Field(1, ge=0, lt=2**64, description="Seed of everything.")
    mode: Literal["sync", "async"] = Field(
        "async", description="sync: lock-step and deterministic; async: all stages overlap."
    )
    max_policy_lag: Count = Field(
        1,
        description="async: steps sampled more than this many versions ago are not trained on. Rollouts wait before "
        "they would produce such steps.",
    )
    environment: EnvironmentSettings = EnvironmentSettings()
    model: ModelSettings = ModelSettings()
    rollout: RolloutSettings = RolloutSettings()
    policy_server: PolicyServerSettings = PolicyServerSettings()
    weight_sync: WeightSyncSettings = WeightSyncSettings()
    scoring: ScoringSettings = ScoringSettings()
    learner: LearnerSettings = LearnerSettings()
    algorithm: AnyAlgorithmSettings = Field(default_factory=default_algorithm)
    entropy: EntropySettings = EntropySettings()
    training: TrainingSettings = TrainingSettings()
    warm_start: WarmStartSettings = WarmStartSettings()
    logging: LoggingSettings = LoggingSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _transport_suits_devices(self) -> RunConfig:
        transport = self.weight_sync.transport
        if transport == "nccl" and "cpu" in (self.policy_server.device, self.learner.device):
            raise ValueError(
                "weight_sync.transport nccl needs policy_server.device and learner.device cuda; use gloo on CPUs"
            )
        if transport == "gloo" and self.policy_server.device == "cuda":
            raise ValueError("weight_sync.transport gloo is for CPUs; use nccl with policy_server.device cuda")
        if transport == "nccl" and self.shares_gpus:
            raise ValueError(
                "weight_sync.transport nccl needs a GPU for each process: leave it at auto, or set "
                "policy_server.gpu_share and learner.gpu_share to 1"
            )
        return self

    @model_validator(mode="after")
    def _engines_apply_the_adapters(self) -> RunConfig:
        lora, dtype = self.learner.lora, self.model.dtype
        if lora is None:
            return self
        if lora.serving == "merged":
            if dtype != "float32" and self.learner.zero_stage == 3:
                raise ValueError(
                    "learner.lora.serving merged in bfloat16 needs learner.zero_stage below 3: a rank multiplies by "
                    "merged weights, as the engines do, and has to have them whole"
                )
            return self
        if lora.rank > max(ENGINE_RANKS):
            raise ValueError(f"learner.lora.rank is {lora.rank}; vLLM applies adapters up to rank {max(ENGINE_RANKS)}")
        if dtype == "float32" and self.policy_server.device == "cuda":
            raise ValueError(
                "vLLM applies no float32 adapters on GPUs: set model.dtype bfloat16, or learner.lora.serving merged"
            )
        if dtype != "float32" and not log2(lora.alpha / lora.rank).is_integer():
            raise ValueError(
                f"learner.lora.alpha / learner.lora.rank is {lora.alpha / lora.rank:g}; in bfloat16 it must be a power "
                "of 2, such as 2 or 0.5: vLLM rounds B times it, so engines would apply other adapters than the learner"
            )
        return self

    @model_validator(mode="after")
    def _engines_leave_room_on_their_gpus(self) -> RunConfig:
        server = self.policy_server
        if server.sleep and self.mode != "sync":
            raise ValueError("policy_server.sleep needs mode sync: in mode async the servers answer during an update")
        fits = server.gpu_memory_utilization <= server.gpu_share or server.sleep
        if server.device == "cuda" and not fits:
            raise ValueError(
                f"policy_server.gpu_memory_utilization {server.gpu_memory_utilization:g} is more than "
                f"policy_server.gpu_share {server.gpu_share:g}: lower it, or let the servers give their memory back "
                "while the learner trains (policy_server.sleep, mode sync)"
            )
        return self

    @property
    def shares_gpus(self) -> bool:
        """Whether a policy server or a learner rank may have its GPU in common with others; NCCL then connects none."""
        return min(self.policy_server.gpu_share, self.learner.gpu_share) < 1
