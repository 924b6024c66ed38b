"""The sync check passes what rounding explains, and fails whatever a load can leave undone.

Weights are a table of logits for each prompt, so that the right log-probabilities are known. How a real engine fails it
is in tests/actors/serving/test_weight_transfer.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.generation import Generation, GenerationRequest
from actors.trajectory import TrajectoryBatch
from cluster.config.files import validate
from cluster.errors import CosoError
from cluster.run.sync_check import PROMPTS, SyncCheck, agree, fit, tolerance

VOCABULARY, LENGTH, TEMPERATURE = 5, 24, 0.5


class Policy:
    """A distribution per position that depends on the prompt; `step` moves it as an update does."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits  # float64 (prompts, LENGTH, VOCABULARY)

    @classmethod
    def random(cls, seed: int, certain: int = 16) -> Policy:
        logits = np.random.default_rng(seed).normal(size=(8, LENGTH, VOCABULARY))
        logits[:, :certain, 0] += 20.0  # the form of the answer, which every version knows
        return cls(logits)

    def step(self, size: float, seed: int) -> Policy:
        moves = np.random.default_rng(seed).normal(size=self.logits.shape)
        return Policy(self.logits + size * moves)

    def logprobs(self, prompt: str, ids: np.ndarray) -> np.ndarray:
        scaled = self.logits[int(prompt)] / TEMPERATURE
        rows = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        return rows[np.arange(len(ids)), ids].astype(np.float32)

    def answer(self, request: GenerationRequest) -> Generation:
        generator = np.random.default_rng(request.seed)
        scaled = self.logits[int(request.prompt)] / TEMPERATURE
        ids = (scaled + generator.gumbel(size=scaled.shape)).argmax(axis=1).astype(np.int32)
        return Generation(np.zeros(3, np.int32), ids, self.logprobs(request.prompt, ids), [(1, 0)], "stop", "", 0.0)

    def batch(self) -> TrajectoryBatch:
        rows = []
        for number in range(len(self.logits)):
            made = self.answer(GenerationRequest(str(number), "image", b"", TEMPERATURE, LENGTH, number))
            rows.append({"prompt": str(number), "image": "image", "response_ids": made.response_ids,
                         "behaviour_logprobs": made.logprobs})  # fmt: skip
        return TrajectoryBatch.from_rows(rows, {"image": b""})


def make_check(**sync: Any) -> SyncCheck:
    return SyncCheck(validate({"rollout": {"temperature": TEMPERATURE}, "weight_sync": sync}))


def ask(check: SyncCheck, engine: Policy, learner: Policy, noise: float = 1e-5) -> dict[str, float]:
    """One check: the batch of the engine's earlier version is irrelevant here, so its own is taken."""
    check.choose(engine.batch())
    answers = [engine.answer(request) for request in check.requests]
    rows = check.rows(answers)
    generator = np.random.default_rng(0)
    logprobs = [
        learner.logprobs(prompt, ids) + generator.normal(size=len(ids)).astype(np.float32) * noise
        for prompt, ids in zip(rows.column("prompt"), rows.ragged("response_ids", np.int32), strict=True)
    ]
    return check.judge("policy server 0", 1, answers, logprobs)


def test_good_loads_pass_and_the_version_before_fits_worse() -> None:
    check, policy = make_check(), Policy.random(0)
    first = ask(check, policy, policy)
    assert "sync_check/previous_difference" not in first and first["sync_check/mean_difference"] < 1e-4
    for seed in range(6):
        policy = policy.step(0.05, seed)
        row = ask(check, policy, policy)
        assert row["sync_check/previous_difference"] > 100 * row["sync_check/mean_difference"]
        assert 0 <= row["sync_check/kl"] < 1e-6


def test_the_least_certain_prompts_are_asked_and_certain_tokens_do_not_count() -> None:
    policy = Policy.random(1)
    policy.logits[:4, :, 0] += 20.0  # four prompts with certain answers
    check = make_check()
    check.choose(policy.batch())
    assert {request.prompt for request in check.requests} == {"4", "5", "6", "7"} and len(check.requests) == PROMPTS
    row = ask(check, policy, policy)
    assert 16 <= row["sync_check/tokens"] <= 8 * (LENGTH - 16)


@pytest.mark.parametrize("size", [0.01, 0.05])
def test_an_engine_that_skipped_a_load_fits_no_better_than_before(size: float) -> None:
    """The same 16 first tokens are certain for both versions: a check of these alone would pass."""
    old = Policy.random(2)
    new = old.step(size, 3)
    request = GenerationRequest("0", "image", b"", TEMPERATURE, LENGTH, 0)
    first = old.answer(request).response_ids[:16]
    assert np.abs(old.logprobs("0", first) - new.logprobs("0", first)).max() < 1e-4
    check = make_check()
    ask(check, old, old)
    with pytest.raises(CosoError, match="has not loaded the new weights|weights or caches are stale"):
        ask(check, old, new)


def test_weights_that_hardly_moved_are_no_reason_to_stop() -> None:
    check, policy = make_check(), Policy.random(4)
    for seed in range(3):
        policy = policy.step(1e-6, seed)
        ask(check, policy, policy, noise=1e-4)


def test_coarse_rounding_is_not_taken_for_a_stale_engine() -> None:
    """A bfloat16 engine whose rounding is near what the weights move, and much of the tolerance."""
    check, policy = make_check(), Policy.random(8)
    for seed in range(6):
        row = ask(check, policy, policy, noise=0.03)
        policy = policy.step(0.01, seed)
    assert 0.3 < row["sync_check/mean_difference"] / row["sync_check/previous_difference"] < 1


def test_one_far_token_does_not_decide_but_many_do_and_the_temperature_scales() -> None:
    policy = Policy.random(5)
    stale = policy.step(0.02, 6)  # in logits, so in log-probabilities twice as much
    with pytest.raises(CosoError, match="check_tolerance"):
        ask(make_check(check_tolerance=0.005), policy, stale)
    row = ask(make_check(check_tolerance=0.05), policy, stale)
    assert 0.01 < row["sync_check/mean_difference"] * TEMPERATURE < 0.05 < row["sync_check/max_difference"] * 2


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize("judged", [16, 2508])
def test_rounding_of_bfloat16_passes_and_a_stale_head_does_not(judged: int, temperature: float) -> None:
    """As measured with the same weights on both sides: 2,508 tokens, at temperature 0.2 one of them 0.285 away."""
    generator = np.random.default_rng(0)
    config = validate({"model": {"dtype": "bfloat16"}, "rollout": {"temperature": temperature}})
    engine = generator.uniform(-4.0, -0.2, judged)
    rounded = engine + generator.normal(size=judged) * 0.02 / temperature
    rounded[3] = engine[3] + 0.285 * 0.2 / temperature
    stale = rounded + generator.choice([-0.8, 0.8], judged) / temperature
    assert agree(fit([engine], [rounded]), temperature, tolerance(config))
    assert not agree(fit([engine], [stale]), temperature, tolerance(config))
    few = rounded.copy()
    few[::16] += 4.0 / temperature  # a stale cache: few tokens, but far away
    assert not agree(fit([engine], [few]), temperature, tolerance(config))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["engine", "learner"])
def test_what_is_not_finite_fails(side: str, number: float) -> None:
    policy, broken = Policy.random(7), Policy.random(7)
    check = make_check(check_tolerance=1e9)
    check.choose(policy.batch())
    answers = [policy.answer(request) for request in check.requests]
    logprobs = [
        broken.logprobs(request.prompt, a.response_ids) for request, a in zip(check.requests, answers, strict=True)
    ]
    ({"engine": answers[2].logprobs, "learner": logprobs[2]}[side])[5] = number
    with pytest.raises(CosoError, match="not finite"):
        check.judge("policy server 0", 3, answers, logprobs)
