"""Profiles average influence over positions and words, as the definition says."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.profiles import influential_words, position_profile

answers = st.lists(st.lists(st.floats(0, 1, width=32), max_size=12), max_size=6)


@given(answers, st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_a_profile_is_the_mean_of_the_tokens_in_each_place(values, bins):
    inside = [[] for _ in range(bins)]
    for value in values:
        for i, one in enumerate(value):
            inside[(2 * i + 1) * bins // (2 * len(value))].append(one)
    profile, counts = position_profile([np.array(value, np.float32) for value in values], bins)
    assert counts.tolist() == [len(some) for some in inside]
    np.testing.assert_allclose(profile, [np.mean(some) if some else 0 for some in inside], atol=1e-6)


def test_words_are_ordered_by_mean_influence_and_blanks_around_them_do_not_matter():
    made = [
        ([" add", '", "', "+"], np.array([0.5, 0.0, 1.0])),
        (["add ", " so", ""], np.array([0.9, 0.1, 0.3])),
    ]
    found = influential_words(made)
    assert [(text, round(mean, 6), times) for text, mean, times in found] == [
        ("+", 1.0, 1),
        ("add", 0.7, 2),
        ("so", 0.1, 1),
    ]
    assert len(influential_words(made, count=2)) == 2 and influential_words([]) == []
