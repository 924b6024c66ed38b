"""Defaults that depend on the machine."""

from __future__ import annotations

import os

import pytest

from learner.settings import LearnerSettings


@pytest.mark.parametrize(
    ("given", "cpus", "threads"),
    [
        ({}, 64, 1),  # on a CPU, results are those of one thread
        ({"device": "cuda"}, 64, 8),
        ({"device": "cuda", "ranks": 8}, 64, 8),
        ({"device": "cuda", "ranks": 8}, 32, 4),
        ({"device": "cuda", "ranks": 8}, 4, 1),
        ({"device": "cuda", "threads": 3}, 64, 3),
        ({"threads": 2}, 64, 2),
    ],
)
def test_threads_of_a_rank(given: dict, cpus: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    assert LearnerSettings(**given).rank_threads == threads
