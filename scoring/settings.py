"""The settings of the scoring pool and its structural causal model (CoSo, arXiv 2505.03792)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from envs.settings import Count, Section


class ScmSettings(Section):
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


class ScoringSettings(Section):
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
    scm: ScmSettings = ScmSettings()
