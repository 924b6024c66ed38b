"""Learning rates as functions of the step."""

from __future__ import annotations

import pytest

from learner.schedules import learning_rate, warm_up_and_decay
from learner.settings import LearnerSettings


def test_cosine_goes_from_start_to_final_over_the_updates():
    settings = LearnerSettings(learning_rate=1e-3, final_learning_rate=1e-4)
    rates = [learning_rate(settings, update, 5) for update in range(7)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[2] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[4:] == pytest.approx([1e-4] * 3)
    assert rates == sorted(rates, reverse=True)


def test_constant_stays():
    settings = LearnerSettings(learning_rate=1e-3, schedule="constant")
    assert {learning_rate(settings, update, 5) for update in range(9)} == {1e-3}


def test_a_schedule_of_one_update_starts_at_the_start():
    assert learning_rate(LearnerSettings(learning_rate=1e-3), 0, 1) == pytest.approx(1e-3)


@pytest.mark.parametrize("steps", [1, 2, 20, 250])
def test_warm_up_reaches_the_peak_and_decay_never_quite_zero(steps):
    rates = [warm_up_and_decay(3e-3, step, steps, 0.1) for step in range(steps)]
    assert max(rates) == pytest.approx(3e-3)
    assert min(rates) > 0
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
