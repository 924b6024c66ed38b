"""Utterances are cut into tasks: each is in one of them, within limits, and all scorers end at about the same time."""

import heapq

from hypothesis import given
from hypothesis import strategies as st

from scoring.utterances import cut_into_tasks

COSTS = st.lists(st.integers(0, 200), max_size=60)


@given(COSTS, st.integers(1, 8), st.integers(1, 16), st.integers(1, 400))
def test_every_row_is_in_one_task_and_every_task_is_within_its_limits(costs, workers, most, most_cost):
    tasks = cut_into_tasks(dict(enumerate(costs)), workers=workers, most=most, most_cost=most_cost)
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
    for task in cut_into_tasks(dict(enumerate(costs)), workers=workers, most=1000, most_cost=10**9):
        heapq.heapreplace(ends, ends[0] + sum(costs[row] for row in task))
    assert max(ends) <= sum(costs) / workers + max(costs)
