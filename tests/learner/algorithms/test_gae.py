"""GAE against its definition as a double sum."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms.gae import gae

numbers = st.floats(-5, 5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12),
    bootstrap=numbers,
    discount=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
)
def test_it_is_the_discounted_sum_of_all_later_surprises(steps, bootstrap, discount, gae_lambda):
    rewards, values = map(list, zip(*steps, strict=True))
    following = [*values[1:], bootstrap]
    expected = [
        sum(
            (discount * gae_lambda) ** (later - now) * (rewards[later] + discount * following[later] - values[later])
            for later in range(now, len(rewards))
        )
        for now in range(len(rewards))
    ]
    found = gae(np.array(rewards), np.array(values), bootstrap, discount, gae_lambda)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_with_lambda_one_the_return_is_that_of_monte_carlo():
    rewards, values = np.array([1.0, 0.0, 2.0]), np.array([0.3, -0.2, 0.7])
    returns = gae(rewards, values, 4.0, 0.5, 1.0) + values
    np.testing.assert_allclose(returns, [1 + 0.25 * 2 + 0.125 * 4, 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4])
