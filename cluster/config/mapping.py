"""From the run's config to the options of each stage, which know nothing of the config."""

from __future__ import annotations

from dataclasses import replace

from cluster.config.run_config import RunConfig
from learner.algorithms.ppo import PpoOptions
from learner.group import RankResources
from learner.model import LoraOptions
from learner.options import EngineOptions, LearnerOptions, PublishOptions, ScheduleOptions, SupervisedOptions


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
