"""From the run's config to the options of each stage, which know nothing of the config."""

from __future__ import annotations

from pathlib import Path

from actors.rollouts.environment_restarts import RestartPolicy
from actors.rollouts.worker import RolloutOptions
from actors.serving.policy_engine import PolicyServerOptions
from actors.serving.weight_transfer import Transport
from cluster.config.run_config import RunConfig
from scoring.pool.scoring_pool import PoolSettings
from scoring.scm.model import ScmSettings
from scoring.scm.training import ScmTrainingSettings


def transport(config: RunConfig, nodes: int) -> Transport:
    """The configured weight transport, `auto` decided by device and number of nodes."""
    chosen = config.weight_sync.transport
    if chosen != "auto":
        return chosen
    if config.policy_server.device == "cuda" and config.learner.device == "cuda":
        return "nccl"
    return "shared_memory" if nodes == 1 else "object_store"


def policy_server_options(config: RunConfig, temporary: Path, index: int, chosen: Transport) -> PolicyServerOptions:
    server = config.policy_server
    return PolicyServerOptions(
        model_path=config.model.path,
        temp_folder=str(temporary / f"v{index}"),
        dtype=config.model.dtype,
        max_model_len=server.max_model_len,
        max_concurrent_requests=server.max_concurrent_requests,
        device=server.device,
        tensor_parallel=server.tensor_parallel,
        kv_cache_bytes=server.kv_cache_bytes,
        gpu_memory_utilization=server.gpu_memory_utilization,
        seed=config.seed,
        transport=chosen,
        start_deadline_s=server.start_deadline_s,
        generate_deadline_s=server.generate_deadline_s,
    )


def rollout_options(config: RunConfig) -> RolloutOptions:
    environment = config.environment
    return RolloutOptions(
        run=config.name,
        run_seed=config.seed,
        environment=environment.id,
        environment_kwargs=environment.kwargs,
        slots=config.rollout.envs_per_worker,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        environment_deadline_s=environment.deadline_s,
        environment_start_deadline_s=environment.start_deadline_s,
        # A server that died takes up to its start deadline to come back; an answer may wait for that.
        answer_deadline_s=config.policy_server.generate_deadline_s + config.policy_server.start_deadline_s,
        restart_policy=RestartPolicy(
            initial_s=environment.restart_backoff_s,
            quarantine_after=environment.quarantine_after,
            quarantine_s=environment.quarantine_s,
        ),
    )


def scm_settings(config: RunConfig, vocab_size: int, head_sizes: tuple[int, ...]) -> ScmSettings:
    scm = config.scoring.scm
    return ScmSettings(
        vocab_size=vocab_size,
        head_sizes=head_sizes,
        hidden=scm.hidden,
        layers=scm.layers,
        heads=scm.heads,
        feedforward=scm.feedforward,
        max_tokens=scm.max_tokens,
    )


def scm_training_settings(config: RunConfig) -> ScmTrainingSettings:
    scm = config.scoring.scm
    return ScmTrainingSettings(
        learning_rate=scm.learning_rate,
        rounds=scm.rounds,
        round_utterances=scm.round_utterances,
        minibatch=scm.minibatch,
        buffer_utterances=scm.buffer_utterances,
        seed=config.seed,
    )


def pool_settings(config: RunConfig) -> PoolSettings:
    scoring = config.scoring
    gpus = 0.25 if scoring.device == "cuda" else 0.0
    return PoolSettings(
        workers=scoring.workers,
        worker_cpus=config.cluster.scorer_cpus,
        trainer_cpus=config.cluster.scorer_cpus,
        worker_gpus=gpus,
        trainer_gpus=gpus,
        device=scoring.device,
        estimator=scoring.estimator,
        precision=scoring.precision,
        window=scoring.window,
        batch_tokens=scoring.batch_tokens,
        longest=scoring.longest_exact,
        cache_bytes=scoring.cache_bytes,
        task_utterances=scoring.batch_utterances,
        score_deadline_s=scoring.deadline_s,
        train_deadline_s=scoring.deadline_s,
        max_failures=config.cluster.max_recoveries + 1,
    )
