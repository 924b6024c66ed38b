"""How utterances are shared out among scorers: all of them once, within bounds, and so that no scorer ends late."""

import heapq

from hypothesis import given
from hypothesis import strategies as st

from scoring.utterances import shared_out

COSTS = st.lists(st.integers(0, 200), max_size=60)


@given(COSTS, st.integers(1, 8), st.integers(1, 16), st.integers(1, 400))
def test_every_row_is_in_one_task_and_no_task_is_beyond_its_bounds(costs, workers, most, most_cost):
    tasks = shared_out(dict(enumerate(costs)), workers=workers, most=most, most_cost=most_cost)
    assert sorted(row for task in tasks for row in task) == list(range(len(costs)))
    left = sum(costs)
    for task in tasks:
        cost = sum(costs[row] for row in task)
        assert 1 <= len(task) <= most
        assert len(task) == 1 or cost <= min(most_cost, left / workers)
        left -= cost
    largest = [max(costs[row] for row in task) for task in tasks]
    assert largest == sorted(largest, reverse=True)


@given(COSTS.filter(any), st.integers(1, 8))
def test_workers_that_pull_tasks_end_within_one_row_of_each_other(costs, workers):
    ends = [0] * workers
    for task in shared_out(dict(enumerate(costs)), workers=workers, most=1000, most_cost=10**9):
        heapq.heapreplace(ends, ends[0] + sum(costs[row] for row in task))
    assert max(ends) <= sum(costs) / workers + max(costs)
