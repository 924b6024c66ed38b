"""Calibration error and reliability curve equal the definition, one prediction at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.scm.calibration import expected_calibration_error

outcomes = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.integers(0, 10).map(lambda n: n / 10)), st.booleans()),
    min_size=1,
    max_size=60,
)


def slow_calibration(pairs, bins):
    error, curve = 0.0, []
    for i in range(bins):
        low, high = i / bins, (i + 1) / bins
        inside = [(c, ok) for c, ok in pairs if (low < c or i == 0) and c <= high]
        if not inside:
            curve.append((0, 0.0, 0.0))
            continue
        confidence = sum(c for c, _ in inside) / len(inside)
        accuracy = sum(ok for _, ok in inside) / len(inside)
        curve.append((len(inside), confidence, accuracy))
        error += len(inside) / len(pairs) * abs(accuracy - confidence)
    return error, curve


@given(outcomes, st.sampled_from([1, 4, 8, 16]))
@settings(max_examples=200, deadline=None)
def test_equals_the_slow_definition(pairs, bins):
    error, curve = expected_calibration_error([c for c, _ in pairs], [ok for _, ok in pairs], bins)
    expected_error, expected_curve = slow_calibration(pairs, bins)  # bins of powers of two have exact edges
    assert error == pytest.approx(expected_error, abs=1e-12)
    for point, (count, confidence, accuracy) in zip(curve, expected_curve, strict=True):
        assert point.count == count
        assert (point.confidence, point.accuracy) == pytest.approx((confidence, accuracy), abs=1e-12)


def test_known_values():
    assert expected_calibration_error([0.75] * 4, [True, True, True, False])[0] == 0.0
    assert expected_calibration_error([1.0, 1.0], [False, False])[0] == 1.0
    assert expected_calibration_error([0.0, 0.0], [False, False])[0] == 0.0


@pytest.mark.parametrize("arguments", [([], []), ([0.5], [True, False]), ([1.5], [True]), ([float("nan")], [True])])
def test_bad_input_is_refused(arguments):
    with pytest.raises(ValueError):
        expected_calibration_error(*arguments)
