"""The request that a rollout worker sends to a policy server, and the server's answer or refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class GenerationRequest:
    """What the policy sees at one step of an episode."""

    prompt: str  # the environment's prompt, before the chat template
    image: str  # content hash (`actors.trajectory.image_hash`); equal hashes mean equal pixels
    png: bytes  # the image, PNG-encoded
    temperature: float  # >= 0; 0 takes the most likely token
    max_new_tokens: int  # >= 1, the end token included
    seed: int | None = None  # of this answer's sampling, 0 <= seed < 2**63; None: the engine's own random numbers


@dataclass(frozen=True)
class Generation:
    """One answer: the sampled ids and the log-probabilities that they were sampled with."""

    prompt_ids: np.ndarray  # int32 (P,) as the engine saw them, image tokens expanded
    response_ids: np.ndarray  # int32 (n,), the end token included when there is one
    logprobs: np.ndarray  # float32 (n,) nats, after temperature and the ban on special tokens
    version_spans: list[tuple[int, int]]  # (version, start): weights `version` sampled the tokens from `start` on
    finish_reason: str  # "stop" at an end token, "length" at `max_new_tokens` or the engine's longest sequence
    text: str  # `response_ids` decoded, special tokens left out
    seconds: float  # from the request's arrival at the server to its answer


#: Why a request has no answer; also the `end_reason` of its episode.
RefusalReason = Literal["prompt_too_long", "image_refused", "request_refused"]


@dataclass(frozen=True)
class Refusal:
    """What comes instead of an answer where a request cannot have one. Asking again would not change that."""

    reason: RefusalReason
    detail: str  # what was refused, and by what
