"""From the run's config to the options of each stage, which know nothing of the config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from actors.rollouts.environment_restarts import RestartPolicy
from actors.rollouts.worker import RolloutOptions
from actors.serving.policy_engine import PolicyServerOptions
from actors.serving.weight_transfer import Transport
from cluster.config.run_config import RunConfig
from learner.algorithms.ppo import PpoOptions
from learner.group import RankResources
from learner.model import LoraOptions
from learner.options import EngineOptions, LearnerOptions, PublishOptions, ScheduleOptions, SupervisedOptions


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


def learner_options(config: RunConfig, model_path: str, publishing: PublishOptions | None = None) -> LearnerOptions:
    learner, algorithm = config.learner, config.algorithm
    return LearnerOptions(
        model_path=model_path,
        value_hidden=config.model.value_hidden,
        value_gradient=algorithm.value_gradient,
        algorithm=PpoOptions(
            discount=algorithm.discount,
            gae_lambda=algorithm.gae_lambda,
            clip=algorithm.clip,
            value_coefficient=algorithm.value_coefficient,
            thought_weight=algorithm.thought_weight,
            ratio_limit=algorithm.ratio_limit,
            normalize_advantages=algorithm.normalize_advantages,
            entropy_mode=config.entropy.mode,
            entropy_coefficient=config.entropy.coefficient,
        ),
        epochs=algorithm.epochs,
        lora=LoraOptions(rank=learner.lora.rank, alpha=learner.lora.alpha, dropout=learner.lora.dropout)
        if learner.lora
        else None,
        gradient_checkpointing=learner.gradient_checkpointing,
        seed=config.seed,
        temperature=config.rollout.temperature,
        minibatch=learner.minibatch,
        micro_batch=learner.micro_batch,
        token_chunk=learner.token_chunk,
        engine=EngineOptions(
            device=learner.device,
            dtype=config.model.dtype,
            zero_stage=learner.zero_stage,  # type: ignore[arg-type]
            threads=learner.threads,
            weight_decay=learner.weight_decay,
            betas=learner.betas,
            epsilon=learner.epsilon,
            gradient_clip=learner.gradient_clip,
        ),
        schedule=ScheduleOptions(
            learning_rate=learner.learning_rate,
            final_learning_rate=learner.final_learning_rate,
            value_learning_rate=learner.value_learning_rate,
            shape=learner.schedule,
            total_updates=config.training.updates,
        ),
        publishing=publishing,
    )


def warm_start_learner_options(config: RunConfig, model_path: str) -> LearnerOptions:
    """The learner of supervised fine-tuning: the run's, but for AdamW, whose settings there are those that suit fitting
    a model from scratch and not the small careful steps of reinforcement learning."""
    options = learner_options(config, model_path)
    engine = replace(options.engine, betas=(0.9, 0.98), epsilon=1e-8, weight_decay=0.01, gradient_clip=1.0)
    return replace(options, engine=engine, lora=None if config.warm_start.make_model else options.lora)


def supervised_options(config: RunConfig) -> SupervisedOptions:
    settings = config.warm_start
    return SupervisedOptions(
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        informative_weight=settings.informative_weight,
        informative_share=settings.informative_share,
    )


def rank_resources(config: RunConfig) -> RankResources:
    return RankResources(
        cpus=config.cluster.learner_cpus,
        gpus=1.0 if config.learner.device == "cuda" else 0.0,
        start_deadline_s=config.learner.start_deadline_s,
        update_deadline_s=config.learner.update_deadline_s,
    )
