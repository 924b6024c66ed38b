"""Calibration error and reliability curve equal the definition, one prediction at a time."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.calibration import of_probabilities, of_values, read_curve

outcomes = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.integers(0, 10).map(lambda n: n / 10)), st.booleans()),
    min_size=1,
    max_size=60,
)


def slow_curve(pairs, insides):
    """(error, points that are not empty); insides: for each bin, whether a prediction lies in it."""
    error, curve = 0.0, []
    for inside in insides:
        chosen = [(predicted, observed) for predicted, observed in pairs if inside(predicted)]
        if chosen:
            predicted = sum(each for each, _ in chosen) / len(chosen)
            observed = sum(each for _, each in chosen) / len(chosen)
            curve.append((len(chosen), predicted, observed))
            error += len(chosen) / len(pairs) * abs(observed - predicted)
    return error, curve


def assert_equals_slow(curve, expected):
    error, points = expected
    assert curve.error == pytest.approx(error, abs=1e-9)
    assert curve.count.tolist() == [count for count, _, _ in points]
    assert curve.predicted.tolist() == pytest.approx([predicted for _, predicted, _ in points], abs=1e-9)
    assert curve.observed.tolist() == pytest.approx([observed for _, _, observed in points], abs=1e-9)


@given(outcomes, st.sampled_from([1, 4, 8, 16]))
@settings(max_examples=200, deadline=None)
def test_equals_the_slow_definition(pairs, bins):
    def inside(i):  # bins of powers of two have exact edges
        return lambda c: (i / bins < c or i == 0) and c <= (i + 1) / bins

    curve = of_probabilities([c for c, _ in pairs], [ok for _, ok in pairs], bins)
    assert_equals_slow(curve, slow_curve(pairs, [inside(i) for i in range(bins)]))


@given(
    st.lists(st.tuples(st.integers(-20, 20).map(float), st.floats(-9, 9)), min_size=1, max_size=80),
    st.sampled_from([1, 2, 4, 8]),
)
@settings(max_examples=200, deadline=None)
def test_bins_of_values_hold_about_equally_many_and_never_divide_equal_values(pairs, bins):
    ordered = sorted(value for value, _ in pairs)
    upper = [-math.inf, *(ordered[math.ceil(len(ordered) * i / bins) - 1] for i in range(1, bins + 1))]

    def inside(i):
        return lambda v: upper[i] < v <= upper[i + 1]

    curve = of_values([v for v, _ in pairs], [r for _, r in pairs], bins)
    assert_equals_slow(curve, slow_curve(pairs, [inside(i) for i in range(bins)]))
    assert len(curve.count) <= bins and (np.diff(curve.predicted) > 0).all()


def test_known_values():
    assert of_probabilities([0.75] * 4, [True, True, True, False]).error == 0.0
    assert of_probabilities([1.0, 1.0], [False, False]).error == 1.0
    assert of_probabilities([0.0, 0.0], [False, False]).error == 0.0
    values = np.arange(100.0)
    assert of_values(values, values[::-1] + 3).count.tolist() == [10] * 10
    assert of_values(values, values - 3).error == pytest.approx(3.0)
    assert of_values([2.0] * 4, [1.0, 2.0, 3.0, 2.0]).error == 0.0  # noise inside a bin is no miscalibration


def test_a_curve_is_read_back_from_a_row_of_metrics():
    curve = of_probabilities([0.05, 0.1, 0.9], [False, True, True])
    row = json.loads(json.dumps({"update": 3, "scm/other": 1.0, **curve.metrics("scm/")}))
    assert row["scm/reliability_0_count"] == 2 and row["scm/reliability_1_observed"] == 1.0
    again = read_curve(row, "scm/")
    assert again is not None
    for name in ("predicted", "observed", "count"):
        np.testing.assert_array_equal(getattr(again, name), getattr(curve, name))
    assert again.error == curve.error and read_curve(row, "policy/") is None


@pytest.mark.parametrize("arguments", [([], []), ([0.5], [True, False]), ([1.5], [True]), ([float("nan")], [True])])
def test_bad_input_is_refused(arguments):
    with pytest.raises(ValueError):
        of_probabilities(*arguments)


@pytest.mark.parametrize("arguments", [([], []), ([0.5], [1.0, 0.0]), ([float("inf")], [1.0]), ([0.0], [float("nan")])])
def test_values_that_are_no_numbers_are_refused(arguments):
    with pytest.raises(ValueError):
        of_values(*arguments)
