"""Influence equals its formula, and depends on the utterance, the action and the SCM alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.influence import influence, influence_statistics, normalised
from scoring.scm import ScmSettings, StructuralCausalModel

VOCABULARY, NULL = 29, 0
BARE = np.array([i % 5 == 0 for i in range(VOCABULARY)])  # the null token among them
HEADS = (3, 5, 1)


def make_scm(seed: int, head_sizes=HEADS, dtype=torch.float64) -> StructuralCausalModel:
    torch.manual_seed(seed)
    shape = ScmSettings(
        vocab_size=VOCABULARY, head_sizes=head_sizes, hidden=16, layers=2, heads=2, feedforward=32, max_tokens=12
    )
    scm = StructuralCausalModel(shape).to(dtype).eval()
    with torch.no_grad():  # An untrained head says almost the same of everything; make it opinionated.
        for output in scm.outputs:
            output.weight.mul_(6.0)
    return scm


def make_batch(seed: int, count: int, longest: int = 20, heads=HEADS):
    draw = np.random.default_rng(seed)
    utterances = [draw.integers(0, VOCABULARY, draw.integers(0, longest + 1)).astype(np.int32) for _ in range(count)]
    labels = np.stack([draw.integers(-1, size, count) for size in heads], axis=1).astype(np.int32)
    return utterances, labels


def score(scm, utterances, labels, *, window=4, batch_tokens=256):
    masks = [~BARE[ids] for ids in utterances]
    return influence(scm, utterances, labels, masks, window=window, null_id=NULL, batch_tokens=batch_tokens)


@torch.no_grad()
def slow_influence(scm, ids, labels, window):
    """The formula of the method, one utterance and one counterfactual at a time, in plain Python."""

    def action_probability(tokens):
        logits = scm(torch.tensor([tokens]), torch.tensor([len(tokens)]))
        product = 1.0
        for head, label in enumerate(labels):
            if label >= 0:
                row = [float(x) for x in logits[head][0]]
                product *= math.exp(row[label]) / sum(math.exp(x) for x in row)
        return product

    tokens = [int(i) for i in ids]
    if not tokens or all(label < 0 for label in labels):
        return [0.0] * len(tokens)
    effects = []
    for i, token in enumerate(tokens):
        if BARE[token]:
            effects.append(0.0)
        else:
            nulled = [NULL if i <= j < i + window else t for j, t in enumerate(tokens)]
            effects.append(abs(action_probability(tokens) - action_probability(nulled)))
    low, high = min(effects), max(effects)
    return [math.sqrt((effect - low) / (high - low + 1e-10)) for effect in effects]


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_influence_equals_the_slow_reference_padding_included(seed, window):
    scm = make_scm(seed)
    utterances, labels = make_batch(seed, 12)
    labels[3] = -1
    utterances[5] = np.empty(0, np.int32)
    utterances[6] = np.full(4, 5, np.int32)  # nothing that counts
    utterances[7] = np.array([7], np.int32)
    result = score(scm, utterances, labels, window=window)
    assert max(len(ids) for ids in utterances) > scm.settings.max_tokens  # longer than the positions
    assert max(value.max(initial=0) for value in result.values) > 0.9
    for ids, row, value in zip(utterances, labels, result.values, strict=True):
        assert value.dtype == np.float32 and value.shape == ids.shape
        np.testing.assert_allclose(value, slow_influence(scm, ids, row, window), atol=1e-5)


def test_a_score_depends_on_nothing_else_in_the_batch():
    scm = make_scm(3)
    utterances, labels = make_batch(4, 24)
    alone = [score(scm, [ids], labels[i : i + 1]).values[0] for i, ids in enumerate(utterances)]
    order = np.random.default_rng(5).permutation(len(utterances))
    for batch_tokens in (1, 64, 10_000):
        together = score(scm, [utterances[i] for i in order], labels[order], batch_tokens=batch_tokens).values
        for place, i in enumerate(order):
            np.testing.assert_allclose(together[place], alone[i], atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_confident_scm_keeps_its_small_effects():
    """Where 1 - p is far below float64's spacing at 1, effects must still have their digits."""
    scm = make_scm(6, head_sizes=(2,))
    with torch.no_grad():
        scm.outputs[0].bias.copy_(torch.tensor([50.0, 0.0]))
    ids = np.array([1, 2, 3, 4, 6, 7, 8, 9], np.int32)

    def odds_against(tokens):
        logits = scm(torch.tensor(np.array([tokens], np.int64)), torch.tensor([len(tokens)]))[0][0]
        return math.exp(float(logits[1] - logits[0]))  # 1 - p, to its last digit at this size

    effects = []
    for i in range(len(ids)):
        nulled = ids.copy()
        nulled[i : i + 2] = NULL
        effects.append(abs(odds_against(ids) - odds_against(nulled)))
    expected = [math.sqrt((e - min(effects)) / (max(effects) - min(effects) + 1e-10)) for e in effects]
    assert 0 < max(effects) < 1e-15
    value = score(scm, [ids], np.array([[0]]), window=2).values[0]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_what_does_not_count_or_is_repeated_is_not_evaluated():
    scm = make_scm(7, head_sizes=(3,))
    ids = np.array([1, 5, 2, NULL, NULL, 10, 3], np.int32)  # 1, 2, 3 count; 5, 10 and the null token do not
    labels = np.zeros((4, 1), np.int32)
    labels[3] = 2
    rows = 0
    whole = scm.action_log_probability

    def counted(batch, lengths, wanted):
        nonlocal rows
        rows += len(batch)
        return whole(batch, lengths, wanted)

    scm.action_log_probability = counted
    result = score(scm, [ids, ids.copy(), ids.astype(np.int64), ids], labels, window=1)
    assert (result.distinct, result.counterfactuals, rows) == (2, 6, 8)
    np.testing.assert_array_equal(result.values[0], result.values[2])
    assert (result.values[0][[1, 3, 4, 5]] == 0).all() and not np.array_equal(result.values[0], result.values[3])


def test_nothing_to_score_is_a_result_not_an_error():
    assert score(make_scm(0), [], np.empty((0, 3), np.int32)).values == []
    result = score(make_scm(0), [np.array([1, 2], np.int32)], np.full((1, 3), -1, np.int32))
    assert result.counterfactuals == 0 and result.values[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([1, 29], [0, 0, 0], "utterance 0 has token ids from 1 to 29"),
        ([1, 2], [0, 5, 0], "label 5 for head 1"),
        ([1, 2], [0, 0], r"shape \(1, 2\), not \(1, 3\)"),
    ],
)
def test_input_of_another_vocabulary_or_label_space_is_named(ids, labels, message):
    with pytest.raises(ValueError, match=message):
        influence(
            make_scm(0),
            [np.array(ids, np.int32)],
            np.array([labels], np.int32),
            [np.ones(len(ids), bool)],
            window=1,
            null_id=NULL,
            batch_tokens=64,
        )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_normalised_influence_is_in_the_unit_interval_and_keeps_the_order(effects):
    value = normalised(np.array(effects))
    assert (value >= 0).all() and (value <= 1).all() and value.min() == 0
    assert (np.diff(value[np.argsort(effects)]) >= 0).all()


def test_statistics_of_influence():
    values = [np.array([1, 0, 0, 0], np.float32), np.full(20, 0.5, np.float32), np.zeros(0, np.float32)]
    statistics = influence_statistics(values)
    assert statistics == pytest.approx(
        {
            "influence_mean": 11 / 24,
            "influence_max": 1.0,
            "influence_nonzero": 21 / 24,
            "influence_top_decile": (1.0 + 0.1) / 2,
        }
    )
    assert set(influence_statistics([]).values()) == {0.0}
