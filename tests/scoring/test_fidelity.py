"""Agreement of influence with the truth equals its definitions, and is left out where it is undefined."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.fidelity import agreement, mean_of_defined, ranks, span_mass, spearman, top_overlap

few_values = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@given(few_values)
@settings(max_examples=200, deadline=None)
def test_ranks_count_smaller_values_and_half_of_the_equal_ones(numbers):
    expected = [
        sum(other < number for other in numbers) + (1 + sum(other == number for other in numbers)) / 2
        for number in numbers
    ]
    np.testing.assert_allclose(ranks(np.array(numbers, float)), expected)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
@settings(max_examples=200, deadline=None)
def test_spearman_is_the_correlation_of_ranks(pairs):
    left, right = (np.array(side, float) for side in zip(*pairs, strict=True))
    found = spearman(left, right)
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert found is None
        return
    a, b = ranks(left) - ranks(left).mean(), ranks(right) - ranks(right).mean()
    assert found == pytest.approx((a @ b) / np.sqrt((a @ a) * (b @ b)))


def test_spearman_depends_on_order_alone():
    line = np.arange(5.0)
    assert spearman(line, np.exp(line)) == pytest.approx(1) and spearman(line, -line) == pytest.approx(-1)


def test_top_overlap_takes_as_many_top_tokens_as_there_are_true_ones():
    truth = np.array([0, 1, 0, 1, 0.0])
    assert top_overlap(np.array([0.1, 0.9, 0.2, 0.8, 0.0]), truth) == 1
    assert top_overlap(np.array([0.95, 0.9, 0.2, 0.8, 0.0]), truth) == 0.5
    assert top_overlap(np.zeros(5), truth) == 0.5  # of equals the earlier: tokens 0 and 1
    assert top_overlap(truth, np.zeros(5)) is None and top_overlap(truth, np.ones(5)) is None


def test_span_mass_is_a_share_and_undefined_without_a_span_or_influence():
    values = np.array([0.5, 0.0, 1.0, 0.5], np.float32)
    assert span_mass(values, 2) == pytest.approx(0.75) and span_mass(values, 0) == 1
    assert span_mass(values, 4) is None and span_mass(np.zeros(3), 1) is None


def test_agreement_compares_tokens_that_can_count_and_skips_undefined_values():
    estimate = [np.array([0.9, 0.1, 0.5]), np.array([0.3, 0.3])]
    truth = [np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0])]
    countable = [np.array([False, True, True]), np.array([True, True])]
    found = agreement(estimate, truth, countable)
    assert found == pytest.approx({"spearman": 1.0, "top_overlap": 1.0})  # the second utterance has no ranks
    assert agreement([], [], []) == {}
    assert mean_of_defined({"a": [None, 1.0, 3.0], "b": [None]}) == {"a": 2.0}
