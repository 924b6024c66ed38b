"""The fast path equals the SCM evaluated on each counterfactual alone, in every precision and chunk size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.effects.effects import nulled
from scoring.scm.encoder import PRECISIONS, CounterfactualEncoder, in_precision
from scoring.scm.model import StructuralCausalModel
from scoring.scm.shape import ScmSizes
from scoring.settings import ScmEncoderSettings

VOCABULARY = 30


def make_scm(precision="float64", layers=2):
    torch.manual_seed(0)
    settings = ScmEncoderSettings(hidden=16, layers=layers, heads=2, feedforward=32, max_tokens=10)
    scm = StructuralCausalModel(settings, ScmSizes(vocab_size=VOCABULARY, head_sizes=(3, 4)))
    with torch.no_grad():
        for output in scm.outputs:
            output.weight.mul_(5.0)
    return in_precision(scm, precision)


def encoder(scm, *, window=2, batch_tokens=64):
    return CounterfactualEncoder(scm, window=window, null_id=0, batch_tokens=batch_tokens)


@torch.no_grad()
def one_by_one(scm, ids, positions, labels, window):
    rows = [ids, *(nulled(ids, int(position), window, 0) for position in positions)]
    wanted = torch.tensor(labels.tolist())[None]
    return [
        float(scm.action_probability(torch.tensor(np.array([row], np.int64)), torch.tensor([len(ids)]), wanted)) - 1
        for row in rows
    ]


SCMS = {layers: make_scm(layers=layers) for layers in (1, 2)}


@given(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=16),
    st.integers(1, 20),
    st.integers(1, 80),
    st.tuples(st.integers(-1, 2), st.integers(-1, 3)),
    st.sampled_from([1, 2]),
    st.data(),
)
@settings(max_examples=30, deadline=None)
def test_equals_the_scm_on_one_counterfactual_at_a_time(tokens, window, batch_tokens, labels, layers, data):
    ids, labels = np.array(tokens, np.int32), np.array(labels, np.int32)
    positions = np.array(data.draw(st.lists(st.integers(0, len(ids) - 1), unique=True).map(sorted)), np.intp)
    fast = encoder(SCMS[layers], window=window, batch_tokens=batch_tokens)
    found = fast.probabilities_minus_one(ids, positions, labels)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, one_by_one(SCMS[layers], ids, positions, labels, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("bfloat16", 3e-2)])
def test_other_precisions_differ_by_their_rounding_alone(precision, tolerance):
    ids = np.random.default_rng(1).integers(0, VOCABULARY, 40).astype(np.int32)
    where, labels = np.arange(40), np.array([1, 2], np.int32)
    exact = encoder(make_scm()).probabilities_minus_one(ids, where, labels)
    near = encoder(make_scm(precision)).probabilities_minus_one(ids, where, labels)
    assert near.std() > 0
    np.testing.assert_allclose(near, exact, rtol=0, atol=tolerance)


def test_new_weights_are_used_once_they_are_loaded():
    scm = make_scm()
    fast = encoder(scm)
    ids, labels = np.arange(1, 9, dtype=np.int32), np.array([0, 0], np.int32)
    before = fast.probabilities_minus_one(ids, np.arange(8), labels)
    scm.load_state_dict({name: value * 1.1 for name, value in scm.state_dict().items()})
    after = fast.probabilities_minus_one(ids, np.arange(8), labels)
    assert np.abs(before - after).max() > 1e-3
    np.testing.assert_allclose(after, one_by_one(scm, ids, np.arange(8), labels, 2), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"window": 0}, "window"), ({"batch_tokens": 0}, "batch_tokens"), ({"null_id": 30}, "null_id is 30")],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CounterfactualEncoder(SCMS[1], **{"window": 1, "batch_tokens": 64, "null_id": 0, **arguments})


def test_every_precision_is_one_of_torch():
    assert all(isinstance(dtype, torch.dtype) for dtype in PRECISIONS.values())
