"""The soft term: the mean per token over the utterance, utterance by utterance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms.entropy import mean_weighted_entropy


def _slow(mode, entropy, influence, length):
    weights = {"none": [0.0] * length, "uniform": [1.0] * length, "counterfactual": influence[:length]}[mode]
    return sum(b * h for b, h in zip(weights, entropy[:length], strict=True)) / length


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    mode=st.sampled_from(["none", "uniform", "counterfactual"]),
)
def test_it_equals_the_formula_for_each_utterance_alone(lengths, seed, mode):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 1)
    # What stands in the padding must not count, whatever it is.
    entropy, influence = torch.rand(shape, generator=generator) * 5, torch.rand(shape, generator=generator)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    entropy[~mask] = torch.nan
    found = mean_weighted_entropy(mode, entropy, influence, mask)
    expected = [_slow(mode, h, b, n) for h, b, n in zip(entropy.tolist(), influence.tolist(), lengths, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["uniform", "counterfactual"])
def test_the_gradient_reaches_the_entropy_and_not_the_influence(mode):
    entropy = torch.rand(2, 3, requires_grad=True)
    influence = torch.rand(2, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    mean_weighted_entropy(mode, entropy, influence, mask).sum().backward()
    weights = torch.ones(2, 3) if mode == "uniform" else influence.detach()
    torch.testing.assert_close(entropy.grad, weights * mask / torch.tensor([[2.0], [3.0]]))
    assert influence.grad is None
