"""The settings of the scoring pool and its structural causal model (CoSo, arXiv 2505.03792)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from envs.settings import Count, Section

EstimatorName = Literal["scm", "parser", "scm+parser", "uniform", "gradient"]
Precision = Literal["float32", "float64", "bfloat16"]

#: Tokens in one forward pass of the SCM, by device.
PASS_TOKENS = {"cpu": 1536, "cuda": 100_000}


class ScmEncoderSettings(Section):
    """The encoder of the structural causal model. A saved model can be loaded only by an encoder with these settings.

    The defaults are those of the published code.
    """

    hidden: PositiveInt = Field(128, description="Width; a multiple of `heads`.")
    layers: PositiveInt = Field(3, description="Transformer encoder layers.")
    heads: PositiveInt = Field(4, description="Attention heads.")
    feedforward: PositiveInt = Field(512, description="Feed-forward width.")
    max_tokens: PositiveInt = Field(512, description="Learned positions; tokens beyond them share the last one.")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> ScmEncoderSettings:
        if self.hidden % self.heads:
            raise ValueError(
                f"scoring.scm.hidden ({self.hidden}) must be a multiple of scoring.scm.heads ({self.heads})"
            )
        return self


class ScmSettings(ScmEncoderSettings):
    """The structural causal model p(action | utterance), and how it is trained online."""

    learning_rate: PositiveFloat = Field(1e-5, description="Adam learning rate.")
    pretrain_rounds: Count = Field(500, description="Rounds on the warm start's demonstrations, where there are any.")
    rounds: Count = Field(2, description="Rounds per update.")
    round_utterances: PositiveInt = Field(
        1024, description="Utterances of a round, sampled from the buffer without replacement."
    )
    minibatch: PositiveInt = Field(64, description="Utterances per optimizer step.")
    buffer_utterances: PositiveInt = Field(16384, description="Latest utterances kept to sample from.")
    temperature_scaling: bool = Field(
        False,
        description="Divide the logits by a temperature fitted on a tenth of the answers, which is kept out of "
        "training, before influence is computed.",
    )


class ScoringSettings(Section):
    """The scoring pool: how much each token influenced the executed action."""

    estimator: EstimatorName = Field(
        "scm",
        description="scm: change of the causal model's probability of the action (published); parser: exact, parses "
        "the answer again without the token; scm+parser: the causal model where the answer no longer parses; "
        "gradient: one backward pass instead of one forward pass a token, an approximation; uniform: 1 everywhere.",
    )
    workers: PositiveInt = Field(1, description="Scorers (Ray actors).")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where the scorers and the SCM's trainer run.")
    precision: Precision = Field(
        "float64",
        description="Arithmetic of scoring. float64: influence within 1e-6 of its formula; float32: three times as "
        "fast, errors up to 5e-3 in the least influential tokens; bfloat16: for GPUs, larger errors.",
    )
    window: PositiveInt = Field(4, description="Tokens nulled together (published code 4, paper's text 1).")
    null_token: str | None = Field(
        None, description="Token that replaces a nulled one; null: the tokenizer's padding, unknown or end token."
    )
    batch_utterances: PositiveInt = Field(16, description="Distinct utterances a scorer takes at a time, at most.")
    batch_tokens: PositiveInt | None = Field(
        None,
        description="Tokens in one forward pass of the SCM. null: 1,536 on cpu, what fits a core's cache, and 100,000 "
        "on cuda, which small passes leave idle.",
    )
    longest_exact: PositiveInt = Field(
        1024,
        description="Longer utterances (the cost grows with the cube of their length) are scored by gradient, tokens.",
    )
    cache_bytes: Count = Field(64 << 20, description="Scores remembered, bytes; identical answers are scored once.")
    fidelity_utterances: Count = Field(
        16, description="Answers of every batch on which the estimate is compared with the parser; 0: none."
    )
    start_deadline_s: PositiveFloat = Field(
        120.0, description="Deadline for a scorer or the SCM's trainer to start, seconds."
    )
    deadline_s: PositiveFloat = Field(
        300.0,
        description="A scorer that scores no utterance of its task for so long, or an SCM's trainer that ends no "
        "minibatch, is replaced, seconds. A task or a training as a whole may take longer.",
    )
    scm: ScmSettings = ScmSettings()

    @property
    def pass_tokens(self) -> int:
        """Tokens in one forward pass of the SCM, with the default decided."""
        return self.batch_tokens or PASS_TOKENS[self.device]
