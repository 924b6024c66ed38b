"""`RunConfig`: everything a run is made of, composed of the stages' settings. Unknown keys are fatal.

Defaults are the published figures where there are any (PPO with chain-of-thought weighting: RL4VLM, arXiv 2405.10292;
CoSo: arXiv 2505.03792); a config file under `configs/` states what a smaller machine or model needs instead.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from actors.settings import ModelSettings, PolicyServerSettings, RolloutSettings, WeightSyncSettings
from envs.settings import Count, EnvironmentSettings, NonNegative, Section
from learner.algorithms.registry import AnyAlgorithmSettings, default_algorithm
from learner.settings import EntropySettings, LearnerSettings, WarmStartSettings
from scoring.settings import ScoringSettings


class TrainingSettings(Section):
    """How long, and what is kept."""

    updates: PositiveInt = Field(25, description="Policy updates in all.")
    steps_per_update: PositiveInt = Field(512, description="Environment steps an update is made of (whole episodes).")
    evaluate_every: Count = Field(5, description="Evaluate after every n-th update; 0: only before and after.")
    evaluation_episodes: PositiveInt = Field(200, description="Held-out episodes of an evaluation.")
    evaluation_temperature: NonNegative = Field(0.0, description="Sampling temperature when evaluating; 0 is greedy.")
    checkpoint_every: PositiveInt = Field(5, description="Checkpoint after every n-th update.")
    keep_checkpoints: PositiveInt = Field(2, description="Checkpoints kept; older ones are removed.")


class LoggingSettings(Section):
    """Where metrics go besides `metrics.jsonl` and TensorBoard."""

    console: bool = Field(True, description="The live one-screen console (plain lines when not a terminal).")
    wandb_project: str | None = Field(
        None, description="Weights & Biases project; the key is read from the environment (WANDB_API_KEY)."
    )


class ClusterSettings(Section):
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
    # PyTorch takes no larger seed; what takes only 32 bits is given a seed derived from this one.
    seed: int = Field(1, ge=0, lt=2**64, description="Seed of everything.")
    mode: Literal["sync", "async"] = Field(
        "async", description="sync: lock-step and deterministic; async: all stages overlap."
    )
    max_policy_lag: Count = Field(
        1,
        description="async: data made by weights older than this many versions is not trained on; rollouts wait rather "
        "than make it.",
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
        return self
