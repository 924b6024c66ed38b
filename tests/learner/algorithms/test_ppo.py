"""PPO against plain loops over floats, one step and one token at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.trajectory import END_ENVIRONMENT_DIED, TrajectoryBatch
from learner.algorithms.base import Evaluation
from learner.algorithms.entropy import EntropyBonus
from learner.algorithms.ppo import Ppo, PpoSettings
from learner.batch import TokenBatch
from learner.model import PolicyOutput
from learner.settings import EntropySettings

SETTINGS = PpoSettings(thought_weight=0.3, clip=0.2, value_coefficient=0.7)
ENTROPY = EntropySettings(coefficient=0.05)


def ppo(settings: PpoSettings = SETTINGS, entropy: EntropySettings = ENTROPY) -> Ppo:
    return Ppo(settings, EntropyBonus(entropy))


def _problem(lengths, seed, spread=0.3):
    """Random steps with padding full of numbers that must not count."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    rows, width = len(lengths), max(lengths) + 2
    lengths = torch.tensor(lengths)
    positions = torch.arange(width)
    mask = positions < lengths[:, None]
    behaviour = -random(rows, width)
    batch = TokenBatch(
        model_inputs={},
        prompt_lengths=torch.ones(rows, dtype=torch.int64),
        response_lengths=lengths,
        response_ids=torch.zeros(rows, width, dtype=torch.int64),
        response_mask=mask,
        action_mask=mask & (positions >= (random(rows, 1) * (lengths[:, None] + 1)).long()),
        behaviour_logprobs=behaviour,
        influence=random(rows, width),
        sample_weight=(random(rows) > 0.2).float(),
        targets={name: random(rows) * 4 - 2 for name in ("advantages", "returns", "old_values")},
    )
    logprobs = (behaviour + (random(rows, width) - 0.5) * 2 * spread).requires_grad_()
    entropy = (random(rows, width) * 3).requires_grad_()
    values = (batch.targets["old_values"] + random(rows) - 0.5).requires_grad_()
    return batch, PolicyOutput(logprobs, entropy, values)


def _slow(batch, output, options, entropy_settings):
    """The loss of the steps and its metrics, in Python floats."""
    loss, metrics = 0.0, {}

    def add(name, value, weight):
        metrics[name] = metrics.get(name, 0.0) + weight * value

    for b in range(len(batch)):
        n, weight = int(batch.response_lengths[b]), float(batch.sample_weight[b])
        new = old = bonus = kl = entropy = weighted = 0.0
        for i in range(n):
            token_weight = 1.0 if batch.action_mask[b, i] else options.thought_weight
            now, then = float(output.logprobs[b, i]), float(batch.behaviour_logprobs[b, i])
            new, old = new + token_weight * now, old + token_weight * then
            kl += math.exp(now - then) - 1 - (now - then)
            h, influence = float(output.entropy[b, i]), float(batch.influence[b, i])
            entropy, weighted = entropy + h / n, weighted + influence * h / n
        if entropy_settings.mode != "none":
            bonus = entropy_settings.coefficient * (entropy if entropy_settings.mode == "uniform" else weighted)
        ratio, advantage = math.exp(new - old), float(batch.targets["advantages"][b])
        clipped = min(max(ratio, 1 - options.clip), 1 + options.clip) * advantage
        surrogate = clipped if ratio > options.ratio_limit else min(ratio * advantage, clipped)
        value, before, target = (
            float(x[b]) for x in (output.values, batch.targets["old_values"], batch.targets["returns"])
        )
        near = before + min(max(value - before, -options.clip), options.clip)
        value_loss = 0.5 * max((value - target) ** 2, (near - target) ** 2)
        loss += weight * (-surrogate + options.value_coefficient * value_loss - bonus)
        for name, number in {
            "policy_loss": -surrogate,
            "value_loss": value_loss,
            "entropy": entropy,
            "weighted_entropy": weighted,
            "entropy_bonus": bonus,
            "approx_kl": kl,
            "clip_fraction": float(abs(ratio - 1) > options.clip),
            "samples": 1.0,
        }.items():
            add(name, number, weight)
        if weight:
            metrics["ratio_max"] = max(metrics.get("ratio_max", 0.0), ratio)
    metrics.setdefault("ratio_max", 0.0)
    return loss, metrics


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    seed=st.integers(0, 999),
    mode=st.sampled_from(["none", "uniform", "counterfactual"]),
    spread=st.sampled_from([0.05, 0.5, 3.0]),
)
def test_loss_and_metrics_equal_plain_loops(lengths, seed, mode, spread):
    batch, output = _problem(lengths, seed, spread)
    entropy = ENTROPY.model_copy(update={"mode": mode})
    with torch.no_grad():
        loss, metrics = ppo(entropy=entropy).loss(output, batch)
        expected_loss, expected_metrics = _slow(batch, output, SETTINGS, entropy)
    assert float(loss) == pytest.approx(expected_loss, abs=1e-5, rel=1e-5)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5, rel=1e-4)


def test_cutting_a_minibatch_does_not_change_its_gradient():
    batch, output = _problem([3, 5, 2, 6], 1)
    whole, _ = ppo().loss(output, batch)
    gradient = torch.autograd.grad(whole, output.logprobs)[0]
    for rows in ([0, 2], [1, 3]):
        columns = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        targets = {name: column[rows] for name, column in batch.targets.items()}
        part = TokenBatch(**columns, model_inputs={}, targets=targets)
        logprobs = output.logprobs.detach()[rows].requires_grad_()
        loss, _ = ppo().loss(PolicyOutput(logprobs, output.entropy[rows], output.values[rows]), part)
        torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], gradient[rows])


def test_a_step_far_off_policy_neither_dominates_nor_breaks_the_gradient():
    batch, output = _problem([4, 4], 0)
    batch.sample_weight[:] = 1
    batch.targets["advantages"][:] = -1.0
    logprobs = batch.behaviour_logprobs.clone()
    logprobs[0, :4] += 500  # e^500 is infinite in float32
    logprobs.requires_grad_()
    loss, metrics = ppo().loss(PolicyOutput(logprobs, output.entropy, output.values), batch)
    gradient = torch.autograd.grad(loss, logprobs)[0]
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert not gradient[0].any() and gradient[1].any()
    assert metrics["ratio_max"] > 1e8


def test_an_utterance_without_an_action_part_is_all_thoughts():
    batch, output = _problem([5], 3)
    batch.action_mask[:] = False
    found = ppo().step_logprob(output.logprobs, batch)
    torch.testing.assert_close(found, 0.3 * output.logprobs[:, :5].sum(-1))


def _episodes(*episodes):
    """Each a list of rewards and how it ended."""
    rows = [
        {
            "episode": f"e{number}",
            "step": step,
            "reward": reward,
            "terminated": ending == "terminated" and step == len(rewards) - 1,
            "truncated": ending == "truncated" and step == len(rewards) - 1,
            "end_reason": ending if step == len(rewards) - 1 else "",
        }
        for number, (rewards, ending) in enumerate(episodes)
        for step, reward in enumerate(rewards)
    ]
    return TrajectoryBatch.from_rows(rows, {})


PLAIN = PpoSettings(discount=0.5, gae_lambda=0.5, normalize_advantages=False)


def test_what_follows_the_last_step_depends_on_how_the_episode_ended():
    trajectories = _episodes(([0.0, 1.0], "terminated"), ([0.0, 1.0], "truncated"), ([0.0, 0.0], END_ENVIRONMENT_DIED))
    values = np.array([1.0, 2.0] * 3, np.float32)
    final_values = np.array([np.nan, np.nan, np.nan, 4.0, np.nan, np.nan], np.float32)
    targets = ppo(PLAIN).targets(trajectories, Evaluation((), values, final_values))
    # δ of the first step: 0 + 0.5 · 2 − 1 = 0; of the last: 1 − 2, then 1 + 0.5 · 4 − 2, then unknown.
    np.testing.assert_allclose(targets.per_step["advantages"], [-0.25, -1.0, 0.25, 1.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(targets.per_step["returns"], [0.75, 1.0, 1.25, 3.0, 1.0, 2.0], atol=1e-6)


def test_a_failed_environment_is_not_a_reward_of_zero():
    values = np.array([0.5, 0.8], np.float32)
    nothing = np.full(2, np.nan)
    died = ppo(PLAIN).targets(_episodes(([0.0, 0.0], END_ENVIRONMENT_DIED)), Evaluation((), values, nothing))
    lost = ppo(PLAIN).targets(_episodes(([0.0, 0.0], "terminated")), Evaluation((), values, nothing))
    assert died.per_step["advantages"][1] == 0 and died.per_step["returns"][1] == pytest.approx(0.8)
    assert lost.per_step["advantages"][1] < 0 and lost.per_step["advantages"][0] < died.per_step["advantages"][0]


def test_normalised_advantages_leave_unknown_outcomes_at_zero_and_out_of_the_statistics():
    trajectories = _episodes(([1.0, -1.0, 3.0], "terminated"), ([5.0, 9.0], END_ENVIRONMENT_DIED))
    values = np.linspace(-1, 1, 5).astype(np.float32)
    nothing = np.full(5, np.nan)
    plain = ppo(PLAIN).targets(trajectories, Evaluation((), values, nothing))
    normal = ppo(PLAIN.model_copy(update={"normalize_advantages": True})).targets(
        trajectories, Evaluation((), values, nothing)
    )
    known = plain.per_step["advantages"][:4]
    np.testing.assert_allclose(normal.per_step["advantages"][:4], (known - known.mean()) / known.std(), atol=1e-5)
    assert normal.per_step["advantages"][4] == 0
    np.testing.assert_array_equal(normal.per_step["returns"], plain.per_step["returns"])


def test_explained_variance_is_one_for_a_perfect_critic():
    trajectories = _episodes(([0.0, 0.0, 1.0], "terminated"))
    perfect = np.array([0.25, 0.5, 1.0], np.float32)
    nothing = np.full(3, np.nan)
    assert ppo(PLAIN).targets(trajectories, Evaluation((), perfect, nothing)).metrics[
        "explained_variance"
    ] == pytest.approx(1.0)
    assert (
        ppo(PLAIN).targets(trajectories, Evaluation((), np.zeros(3, np.float32), nothing)).metrics["explained_variance"]
        < 0.5
    )
