"""Waiting for Ray calls: an error names what was waited for, and an actor that was restarted is asked again."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from cluster.errors import DeadlineExceeded
from cluster.run.waiting import answer, answer_of_restarted

pytestmark = pytest.mark.usefixtures("ray_cluster")


class DiesOnce:
    """Its first process ends when it is asked."""

    def __init__(self, died: Path) -> None:
        self._died = died

    def ask(self) -> str:
        if not self._died.exists():
            self._died.touch()
            os._exit(1)
        return "here"

    def wait(self) -> None:
        import time

        time.sleep(60)


def actor(died: Path, restarts: int) -> Any:
    return ray.remote(DiesOnce).options(num_cpus=0, max_restarts=restarts).remote(died)


def test_an_actor_that_dies_is_asked_again_once_it_is_back(tmp_path: Path) -> None:
    dying = actor(tmp_path / "died", restarts=-1)
    assert asyncio.run(answer_of_restarted(lambda: dying.ask.remote(), 60.0, "an answer")) == "here"
    assert (tmp_path / "died").exists()


def test_an_actor_that_stays_dead_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    dying = actor(tmp_path / "died", restarts=0)
    with pytest.raises(RayActorError):
        asyncio.run(answer_of_restarted(lambda: dying.ask.remote(), 1.5, "an answer"))


def test_the_error_past_the_deadline_names_what_was_waited_for(tmp_path: Path) -> None:
    slow = actor(tmp_path / "died", restarts=0)
    with pytest.raises(DeadlineExceeded, match="a long sleep did not finish within 0 s"):
        asyncio.run(answer(slow.wait.remote(), 0.3, "a long sleep"))
