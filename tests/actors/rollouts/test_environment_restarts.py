"""Back-off and quarantine of a failing environment, by a clock that the test moves."""

from actors.rollouts.environment_restarts import RestartSchedule
from envs.settings import EnvironmentSettings


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_waits_double_up_to_the_maximum_then_quarantine_until_it_goes_well() -> None:
    clock = Clock()
    settings = EnvironmentSettings(restart_backoff_s=1, restart_backoff_max_s=5, quarantine_after=5, quarantine_s=60)
    schedule = RestartSchedule(settings, clock)
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
