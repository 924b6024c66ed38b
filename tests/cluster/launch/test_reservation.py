"""Actors start where the plan says: on two raylets of a Ray of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

pytestmark = pytest.mark.integration


def test_actors_start_where_they_are_planned_and_a_run_that_does_not_fit_is_refused() -> None:
    # Ray gives a node no GPUs that CUDA_VISIBLE_DEVICES hides.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.launch.two_raylets"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**environment, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    started = found["started"]
    assert started == found["planned"]
    of_kind = {kind: {node for actor, node in started.items() if actor.startswith(kind)} for kind in ("learner", "pol")}
    assert len(of_kind["learner"]) == len(of_kind["pol"]) == 1 and not of_kind["learner"] & of_kind["pol"]
    assert started["trajectory stream 0"] == started["weight registry 0"] == found["driver"]
    assert len({node for actor, node in started.items() if actor.startswith("rollout")}) == 2
    # Each rank has 0.7 of a GPU of its own; each scorer and the SCM's trainer 0.25 of a rank's.
    gpus = Counter(gpu for actor, of_actor in found["gpus"].items() for gpu in of_actor if actor != "policy server 0")
    assert len(found["gpus"]["policy server 0"]) == 2 and not gpus.keys() & set(found["gpus"]["policy server 0"])
    assert len({*found["gpus"]["learner rank 0"], *found["gpus"]["learner rank 1"]}) == 2 and set(gpus.values()) == {2}
    assert "policy server" in found["refused"] and "GPU" in found["refused"] and "\n" not in found["refused"]
