"""From what the rounds of a measurement gave to the rates that a prediction takes."""

from __future__ import annotations

import os

import pytest

from cluster.run.measurement import _cores, _cpu_seconds, _Samples


def test_the_first_round_warms_up_and_of_the_others_the_median_counts() -> None:
    samples = _Samples()
    for seconds in (100.0, 1.0, 2.0, 9.0):
        samples.add(environment_s=seconds, first_answer_s=seconds, further_answer_s=0.0, rank_s=seconds)
        samples.cores.setdefault("scorer", []).append(seconds / 10)
    rates = samples.rates()
    assert (rates.environment_s, rates.rank_s, rates.scm_training_s) == (2.0, 2.0, 0.0)
    assert rates.core_s == {"scorer": pytest.approx(0.2)}


def test_core_seconds_are_those_of_the_block_a_step_and_only_where_all_is_on_this_machine() -> None:
    samples, used = _Samples(), _cpu_seconds([os.getpid()])
    with _cores(samples, "scorer", 10, here=True) as clock:
        while (worked := _cpu_seconds([os.getpid()]) - used) < 0.2:
            pass
        assert clock() >= worked - 0.05
    with _cores(samples, "learner rank", 10, here=False):
        pass
    (a_step,) = samples.cores["scorer"]
    assert a_step >= 0.15 / 10 and "learner rank" not in samples.cores
    assert _cpu_seconds([2**22 + 1]) == 0.0  # of a process that has ended: there is no such id
