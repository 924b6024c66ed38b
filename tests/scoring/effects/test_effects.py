"""Influence is a relative effect in [0, 1], at the positions where nulling changes a token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.effects.effects import influence_of, influence_statistics, normalised, nulled, positions_that_change


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20),
    st.integers(1, 6),
)
@settings(max_examples=200, deadline=None)
def test_a_position_is_left_out_only_where_it_cannot_count_or_nulling_changes_nothing(tokens, window):
    ids = np.array([token for token, _ in tokens], np.int32)
    countable = np.array([can for _, can in tokens], bool)
    expected = [i for i in range(len(ids)) if countable[i] and (nulled(ids, i, window, 0) != ids).any()]
    assert positions_that_change(ids, countable, window, 0).tolist() == expected


def test_effects_go_to_their_positions_and_without_any_there_is_no_influence():
    values = influence_of(5, np.array([1, 3]), np.array([0.25, 1.0]))
    np.testing.assert_allclose(values, [0, 0.5, 0, 1, 0], atol=1e-6)
    assert values.dtype == np.float32
    assert influence_of(3, np.empty(0, int), np.empty(0)).tolist() == [0, 0, 0]
    assert influence_of(0, np.empty(0, int), np.empty(0)).shape == (0,)


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
