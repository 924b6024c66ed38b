"""The worker pool on scorers made up for it: which tasks are raised, waited for, given to another, or given up."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from scoring.pool.scorers import ScorerPool, ScoringError
from tests.scoring.pool.test_scoring_pool import wait_until_gone

pytestmark = pytest.mark.usefixtures("ray_cluster")


@contextmanager
def started(
    scorer: type, *, count: int, task_deadline_s: float, max_failures: int, **options: Any
) -> Iterator[ScorerPool]:
    """A pool of Ray actors of a class; options: of `ray.remote`."""
    scorers = ScorerPool(
        lambda index: ray.remote(num_cpus=0.1, **options)(scorer).remote(),
        count=count,
        start_deadline_s=60,
        task_deadline_s=task_deadline_s,
        max_failures=max_failures,
    )
    scorers.start()
    try:
        yield scorers
    finally:
        scorers.close()


def test_tasks_that_start_after_the_wait_began_are_raised():
    with started(Raised, count=1, task_deadline_s=60, max_failures=2) as scorers:
        start = threading.Timer(0.5, setattr, (scorers, "waited_for", True))
        start.start()
        seen = scorers.run([(0.2,)] * 8)
        assert seen == sorted(seen) and {False, True} == set(seen)
        scorers.waited_for = False
        assert scorers.run([(0.0,)] * 2) == [False, False]


class Raised:
    """A scorer whose tasks answer whether it was raised."""

    def __init__(self):
        self.waited = False

    def ping(self):
        return {"pid": os.getpid()}

    def progress(self):
        return 0

    def set_waited_for(self, waited):
        self.waited = waited

    def score(self, seconds):
        time.sleep(seconds)
        return self.waited


class Sleeper:
    """A scorer that does not answer on some tasks, always or in its first process only."""

    def ping(self):
        return {"pid": os.getpid()}

    def progress(self):
        return 0

    def score(self, value, silent_in):
        if silent_in == "all" or silent_in == os.getpid():
            time.sleep(600)
        if value < 0:
            raise ValueError("a negative task")
        return value


def test_a_scorer_that_does_not_answer_is_replaced_and_a_task_that_none_finishes_is_an_error():
    with started(Sleeper, count=2, task_deadline_s=2, max_failures=2) as scorers:
        silent = scorers.check()[0]["pid"]
        assert scorers.run([(i, silent) for i in range(6)]) == list(range(6))
        assert scorers.replaced == 1
        wait_until_gone(silent)
        with pytest.raises(ValueError, match="a negative task"):  # what a scorer raises is raised here
            scorers.run([(i - 1, None) for i in range(6)])
        assert scorers.run([(i, None) for i in range(6)]) == list(range(6))  # and leaves no stale result
        with pytest.raises(ScoringError, match="score task 3 of 3"):
            scorers.run([(0, None), (1, None), (2, "all")])


class Counting:
    """A scorer that needs as many tenths of a second for a task as the task says."""

    def __init__(self):
        self.done = 0

    def ping(self):
        return {"pid": os.getpid()}

    @ray.method(concurrency_group="watch")
    def progress(self):
        return self.done

    def score(self, tenths, silent):
        for _ in range(tenths):
            time.sleep(0.1)
            self.done += not silent
        return tenths


def test_a_task_longer_than_its_deadline_is_waited_for_as_long_as_it_comes_further():
    with started(Counting, count=1, task_deadline_s=1.6, max_failures=21, concurrency_groups={"watch": 1}) as scorers:
        assert scorers.run([(32, False)]) == [32]
        assert scorers.replaced == 0
        with pytest.raises(ScoringError, match="failed twice in the same way.*did not score task 1 of 1 within 1.6 s"):
            scorers.run([(100, True)])
        assert scorers.replaced == 1  # of the 20 that `max_failures` would allow
