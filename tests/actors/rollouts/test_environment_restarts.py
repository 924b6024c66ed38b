"""Back-off and quarantine of a failing environment, by a clock that the test moves."""

import pytest

from actors.rollouts.environment_restarts import RestartPolicy, RestartSchedule


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_waits_double_up_to_the_maximum_then_quarantine_until_it_goes_well() -> None:
    clock = Clock()
    policy = RestartPolicy(initial_s=1, maximum_s=5, quarantine_after=5, quarantine_s=60)
    schedule = RestartSchedule(policy, clock)
    assert schedule.wait_s() == 0
    for expected_s in (1, 2, 4, 5):
        assert schedule.failed() == expected_s
        assert schedule.wait_s() == expected_s
        assert not schedule.quarantined
        clock.now_s += expected_s
        assert schedule.wait_s() == 0
    assert schedule.failed() == 60
    assert schedule.quarantined
    clock.now_s += 59
    assert schedule.wait_s() == 1 and schedule.quarantined
    clock.now_s += 1
    assert schedule.wait_s() == 0 and not schedule.quarantined
    # One more failure after quarantine is enough for the next.
    assert schedule.failed() == 60
    schedule.succeeded()
    assert schedule.wait_s() == 0 and not schedule.quarantined
    assert schedule.failed() == 1


@pytest.mark.parametrize("fault", [{"initial_s": -1}, {"quarantine_after": 0}, {"quarantine_s": -0.1}])
def test_a_policy_that_makes_no_sense_is_refused(fault: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="restart policy"):
        RestartPolicy(**fault)  # type: ignore[arg-type]
