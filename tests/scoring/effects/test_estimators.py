"""Influence equals its formula, and depends on the utterance, the action and the SCM alone."""

import math

import numpy as np
import pytest
import torch

from scoring.effects.estimators import ESTIMATORS, make_estimator
from scoring.effects.tokens import TokenFacts
from scoring.scm.model import StructuralCausalModel
from scoring.scm.shape import ScmSizes
from scoring.settings import ScmEncoderSettings, ScoringSettings

VOCABULARY, NULL = 29, 0
BARE = np.array([i % 5 == 0 for i in range(VOCABULARY)])  # the null token among them
HEADS = (3, 5, 1)


def make_scm(seed: int, head_sizes=HEADS, dtype=torch.float64, layers=2) -> StructuralCausalModel:
    torch.manual_seed(seed)
    settings = ScmEncoderSettings(hidden=16, layers=layers, heads=2, feedforward=32, max_tokens=12)
    scm = StructuralCausalModel(settings, ScmSizes(vocab_size=VOCABULARY, head_sizes=head_sizes)).to(dtype).eval()
    with torch.no_grad():  # An untrained head says almost the same of everything; larger weights make it confident.
        for output in scm.outputs:
            output.weight.mul_(6.0)
    return scm


def make_batch(seed: int, count: int, longest: int = 20, heads=HEADS):
    draw = np.random.default_rng(seed)
    utterances = [draw.integers(0, VOCABULARY, draw.integers(0, longest + 1)).astype(np.int32) for _ in range(count)]
    labels = np.stack([draw.integers(-1, size, count) for size in heads], axis=1).astype(np.int32)
    return utterances, labels


def estimator(name, scm, *, window=4, batch_tokens=256, longest=1000, interventions=None):
    tokens = TokenFacts(vocab_size=VOCABULARY, countable_by_id=~BARE, null_id=NULL)
    settings = ScoringSettings(window=window, batch_tokens=batch_tokens, longest_exact=longest)
    return make_estimator(name, tokens, settings, scm=scm, interventions=interventions)


def score(scm, utterances, labels, *, name="scm", **how):
    scorer = estimator(name, scm, **how)
    return [scorer.score(ids, row) for ids, row in zip(utterances, labels, strict=True)]


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


@pytest.mark.parametrize(("seed", "window"), [(0, 1), (1, 4)])
def test_influence_equals_the_slow_reference(seed, window):
    scm = make_scm(seed)
    utterances, labels = make_batch(seed, 9)
    labels[3] = -1
    utterances[5] = np.empty(0, np.int32)
    utterances[6] = np.full(4, 5, np.int32)  # nothing that counts
    utterances[7] = np.array([7], np.int32)
    results = score(scm, utterances, labels, window=window)
    assert max(len(ids) for ids in utterances) > scm.settings.max_tokens  # longer than the positions
    assert max(result.values.max(initial=0) for result in results) > 0.9
    for ids, row, result in zip(utterances, labels, results, strict=True):
        assert result.values.dtype == np.float32 and result.values.shape == ids.shape
        np.testing.assert_allclose(result.values, slow_influence(scm, ids, row, window), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_score_depends_on_nothing_that_was_scored_before(dtype):
    scm = make_scm(3, dtype=dtype)
    utterances, labels = make_batch(4, 24)
    alone = [score(scm, [ids], labels[i : i + 1])[0].values for i, ids in enumerate(utterances)]
    order = np.random.default_rng(5).permutation(len(utterances))
    together = score(scm, [utterances[i] for i in order], labels[order])
    for place, i in enumerate(order):
        np.testing.assert_array_equal(together[place].values, alone[i])


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
    value = score(scm, [ids], np.array([[0]]), window=2)[0].values
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_what_does_not_count_is_not_evaluated():
    ids = np.array([1, 5, 2, NULL, NULL, 10, 3], np.int32)  # 1, 2, 3 count; 5, 10 and the null token do not
    result = score(make_scm(7, head_sizes=(3,)), [ids], np.zeros((1, 1), np.int32), window=1)[0]
    assert result.counterfactuals == 3
    assert (result.values[[1, 3, 4, 5]] == 0).all() and result.values.max() > 0.9


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if "parser" not in name])
def test_utterances_with_nothing_to_measure_have_defined_results(name):
    scm = make_scm(0)
    empty, special, one = np.empty(0, np.int32), np.full(5, 10, np.int32), np.array([7], np.int32)
    labels = np.array([[0, 0, 0]] * 3 + [[-1, -1, -1]], np.int32)
    results = score(scm, [empty, special, one, one], labels, name=name)
    expected = [[], [1] * 5, [1], [1]] if name == "uniform" else [[], [0] * 5, [0], [0]]
    assert [result.values.tolist() for result in results] == expected


def test_an_utterance_of_ten_thousand_tokens_is_scored_by_gradient_and_says_so():
    scm = make_scm(1, dtype=torch.float32, layers=1)
    ids = np.random.default_rng(2).integers(0, VOCABULARY, 10_000).astype(np.int32)
    labels = np.zeros((1, 3), np.int32)
    result = score(scm, [ids], labels, longest=500)[0]
    assert result.approximated and result.counterfactuals == 0
    assert result.values.shape == (10_000,) and 0.9 < result.values.max() <= 1


@torch.no_grad()
def test_the_gradient_is_the_change_of_log_probability_to_first_order():
    scm = make_scm(8)
    ids, labels = np.array([1, 2, 3, 4, 6], np.int32), np.array([1, 2, 0], np.int32)
    tokens = torch.from_numpy(ids.astype(np.int64))
    embedded = scm.embed(tokens)

    def log_probability(rows):
        logits = scm.read(rows[None])
        return sum(float(torch.log_softmax(logits[k][0], 0)[label]) for k, label in enumerate(labels))

    window, step, slopes = 2, 1e-5, []
    change = scm.token_embedding.weight[NULL] - scm.token_embedding.weight[tokens]
    for i in range(len(ids)):
        moved = embedded.clone()
        moved[i : i + window] += step * change[i : i + window]
        slopes.append(abs(log_probability(moved) - log_probability(embedded)) / step)
    low, high = 0.0 if BARE[ids].any() else min(slopes), max(slopes)
    expected = [math.sqrt((slope - low) / (high - low)) for slope in slopes]
    value = score(scm, [ids], labels[None], name="gradient", window=window)[0].values
    np.testing.assert_allclose(value, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("scm", "causal model"), ("parser", "parser"), ("scm+parser", "parser"), ("oracle", "choose one")],
)
def test_an_estimator_says_what_is_missing(name, missing):
    with pytest.raises(ValueError, match=missing):
        estimator(name, None if name == "scm" else make_scm(0))
