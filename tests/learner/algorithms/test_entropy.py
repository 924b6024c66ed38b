"""The soft term: the mean per token over the utterance, utterance by utterance, for every way to weigh a token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms.entropy import EntropyBonus
from learner.policy.batch import TokenBatch
from learner.settings import EntropySettings

MODES = ["none", "uniform", "counterfactual", "action_tokens", "random", "token_entropy"]


def _batch(lengths, seed):
    """Random answers; what stands in the padding must not count, whatever it is."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 1)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    entropy = torch.rand(shape, generator=generator) * 5
    entropy[~mask] = torch.nan
    batch = TokenBatch(
        model_inputs={},
        prompt_lengths=torch.ones(len(lengths), dtype=torch.int64),
        response_lengths=torch.tensor(lengths),
        response_ids=torch.randint(0, 50, shape, generator=generator),
        response_mask=mask,
        action_mask=mask & (torch.arange(shape[1]) >= torch.tensor(lengths)[:, None] // 2),
        behaviour_logprobs=torch.zeros(shape),
        influence=torch.rand(shape, generator=generator),
        sample_weight=torch.ones(len(lengths)),
    )
    return entropy, batch


def _slow_weights(mode, weighting, entropy, influence, action, length):
    weights = {
        "none": [0.0] * length,
        "uniform": [1.0] * length,
        "counterfactual": influence[:length],
        "action_tokens": [float(each) for each in action[:length]],
        "token_entropy": [h / max(entropy[:length]) for h in entropy[:length]],
    }[mode]
    if weighting == "mass" and sum(weights) > 0 and mode not in ("none", "uniform"):
        weights = [w * length / sum(weights) for w in weights]
    return weights


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    mode=st.sampled_from([mode for mode in MODES if mode != "random"]),
    weighting=st.sampled_from(["utterance_max", "mass"]),
)
def test_it_equals_the_formula_for_each_utterance_alone(lengths, seed, mode, weighting):
    entropy, batch = _batch(lengths, seed)
    found, metrics = EntropyBonus(EntropySettings(mode=mode, coefficient=0.3, weighting=weighting))(entropy, batch)
    rows = zip(entropy.tolist(), batch.influence.tolist(), batch.action_mask.tolist(), lengths, strict=True)
    expected = []
    for h, b, a, n in rows:
        weights = _slow_weights(mode, weighting, h, b, a, n)
        expected.append(sum(w * each for w, each in zip(weights, h[:n], strict=True)) / n)
    torch.testing.assert_close(metrics["weighted_entropy"], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, 0.3 * torch.tensor(expected), atol=1e-5, rtol=1e-5)
    if weighting == "mass" and mode != "none":
        torch.testing.assert_close(metrics["entropy_weight"], torch.ones(len(lengths)), atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(2, 9), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_random_weights_are_the_influence_in_an_order_of_the_answers_own(lengths, seed):
    from learner.algorithms.entropy import token_weights

    entropy, batch = _batch(lengths, seed)
    chosen = EntropySettings(mode="random")
    whole = token_weights(chosen, entropy, batch)
    for row, length in enumerate(lengths):
        assert sorted(whole[row, :length].tolist()) == sorted(batch.influence[row, :length].tolist())
        assert not whole[row, length:].any()
        columns = {n: v[row : row + 1] for n, v in vars(batch).items() if isinstance(v, torch.Tensor)}
        alone = token_weights(chosen, entropy[row : row + 1], TokenBatch(**columns, model_inputs={}))
        assert torch.equal(alone[0], whole[row])  # however the batch is cut


@pytest.mark.parametrize("mode", ["uniform", "counterfactual", "token_entropy"])
def test_the_gradient_reaches_the_entropy_and_not_the_weights(mode):
    entropy, batch = _batch([2, 3], 1)
    entropy = entropy.nan_to_num(7.0).requires_grad_()
    batch.influence.requires_grad_()
    EntropyBonus(EntropySettings(mode=mode))(entropy, batch)[0].sum().backward()
    largest = (entropy.detach() * batch.response_mask).amax(-1, keepdim=True)
    weights = {"uniform": torch.ones(2, 4), "counterfactual": batch.influence.detach()}.get(
        mode, entropy.detach() / largest
    )
    torch.testing.assert_close(entropy.grad, weights * batch.response_mask / torch.tensor([[2.0], [3.0]]))
    assert batch.influence.grad is None


class Bandit:
    """Ten arms, reward 1 for the best: at α the soft-optimal policy is softmax(reward / α), whose entropy is known."""

    def __init__(self, bonus: EntropyBonus) -> None:
        self.bonus = bonus
        self.logits = torch.zeros(10, requires_grad=True)
        self.rewards = torch.tensor([1.0] + [0.0] * 9)
        self.optimizer = torch.optim.Adam([self.logits], lr=0.05)

    def step(self) -> float:
        logprobs = self.logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum()
        loss = -(logprobs.exp() * self.rewards).sum() - self.bonus.coefficient * entropy
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(entropy.detach())


@pytest.mark.parametrize("start", [0.001, 0.1, 10.0])
def test_a_tuned_coefficient_holds_its_target_from_any_start(start):
    bonus = EntropyBonus(EntropySettings(mode="uniform", coefficient=start, target=1.0))
    bandit = Bandit(bonus)
    entropies = []
    for _ in range(1500):
        entropies.append(bandit.step())
        bonus.adapt(entropies[-1], progress=0.0)
    assert np.abs(np.array(entropies[-300:]) - 1.0).max() < 0.1
    # The answer is known: α at which softmax(r / α) has the target's entropy.
    p = math.exp(1 / bonus.coefficient) / (math.exp(1 / bonus.coefficient) + 9)
    assert -(p * math.log(p) + (1 - p) * math.log((1 - p) / 9)) == pytest.approx(1.0, abs=0.15)


def test_a_target_moves_on_its_course_within_bounds_and_survives_a_resume():
    chosen = EntropySettings(mode="uniform", coefficient=1.0, target=2.0, final_target=1.0, coefficient_max=1.5)
    bonus = EntropyBonus(chosen)
    bonus.adapt(1.5, progress=0.0)
    assert bonus.coefficient > 1.0  # 1.5 is below the target of 2 at the start ...
    before = bonus.coefficient
    bonus.adapt(1.5, progress=1.0)
    assert bonus.coefficient < before  # ... and above that of 1 at the end
    for _ in range(200):
        bonus.adapt(0.0, progress=0.0)
    assert bonus.coefficient == pytest.approx(1.5)
    resumed = EntropyBonus(chosen)
    resumed.load(bonus.state())
    assert resumed.coefficient == bonus.coefficient
    bonus.adapt(3.0, progress=0.0)
    resumed.adapt(3.0, progress=0.0)
    assert resumed.coefficient == bonus.coefficient
    fixed = EntropyBonus(EntropySettings(coefficient=0.2))
    fixed.load(bonus.state())
    assert fixed.coefficient == 0.2
