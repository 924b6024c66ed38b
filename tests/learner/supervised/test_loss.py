"""Supervised fine-tuning: the weighted cross-entropy, and which tokens carry something."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.policy.batch import TokenBatch
from learner.policy.model import PolicyOutput
from learner.supervised.loss import Sft, informative_token_weights


def _batch(lengths, sample_weight):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    zeros = torch.zeros(mask.shape)
    return TokenBatch(
        {},
        torch.ones(len(lengths)),
        torch.tensor(lengths),
        zeros.long(),
        mask,
        mask,
        zeros,
        zeros,
        torch.tensor(sample_weight),
    )


def test_the_loss_is_each_demonstrations_weighted_mean_summed():
    batch = _batch([2, 3, 1], [1.0, 1.0, 0.0])
    logprobs = torch.tensor([[-1.0, -3.0, -99.0], [-0.5, -0.25, -2.0], [-7.0, 0.0, 0.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 3.0, 5.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    parts, metrics = Sft().loss(PolicyOutput(logprobs, logprobs, logprobs[:, 0]), batch, weights)
    loss = (parts["imitation"] * batch.sample_weight).sum()
    expected = (1 * 1 + 3 * 3) / 4 + (2 * 0.5 + 0.25 + 2) / 4
    assert float(loss) == pytest.approx(expected)
    means = {name: float((values * batch.sample_weight).sum()) for name, values in metrics.items()}
    assert means == pytest.approx({"loss": expected, "nll": 2 + 2.75 / 3})
    gradient = torch.autograd.grad(loss, logprobs)[0]
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, -0.75, 0], [-0.5, -0.25, -0.25], [0, 0, 0]]))


def _slow(corpus, weight):
    """For every token: gather, over the whole corpus, what followed the same two tokens."""
    everything = [
        ((None, None, *sequence)[i : i + 2], token) for sequence in corpus for i, token in enumerate(sequence)
    ]
    result = []
    for sequence in corpus:
        weights = []
        for i in range(len(sequence)):
            before = (None, None, *sequence)[i : i + 2]
            after = [token for context, token in everything if context == before]
            entropy = -sum(after.count(t) / len(after) * math.log(after.count(t) / len(after)) for t in set(after))
            weights.append(weight if entropy > 0.1 else 1.0)
        result.append(weights)
    return result


@settings(max_examples=40, deadline=None, derandomize=True)
@given(corpus=st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=6))
def test_informative_tokens_are_those_the_two_before_leave_open(corpus):
    found = informative_token_weights(corpus, 4.0)
    assert [weights.tolist() for weights in found] == _slow(corpus, 4.0)
    assert all(weights.dtype == np.float32 for weights in found)


def test_format_is_not_informative_and_content_is():
    corpus = [[1, 2, state, 3, 4, action] for state, action in [(10, 20), (11, 21), (12, 20)]]
    weights = informative_token_weights(corpus, 5.0)
    assert weights[0].tolist() == [1, 1, 5, 1, 1, 5]


def test_what_is_nearly_always_the_same_is_format():
    corpus = [[1, 2, 3]] * 99 + [[1, 2, 4]]
    assert informative_token_weights(corpus, 5.0)[-1].tolist() == [1, 1, 1]
