"""What a run takes is added up before anything starts, and what is short is said in numbers. No Ray starts here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.files import load_config
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.ray_runtime import (
    _save_actor_logs,
    local_cpus,
    ray_session,
    require_resources,
    required_resources,
    total_resources,
)


def config(*overrides: str) -> RunConfig:
    return load_config([], overrides)


def test_every_kind_of_actor_takes_its_share() -> None:
    rows = required_resources(
        config(
            "policy_server.replicas=3",
            "policy_server.device=cuda",
            "policy_server.tensor_parallel=2",
            "cluster.policy_server_cpus=2",
            "rollout.workers=4",
            "scoring.workers=5",
            "learner.ranks=2",
            "learner.device=cuda",
            "cluster.learner_cpus=1.5",
        )
    )
    assert rows == {
        "policy servers": {"CPU": 6.0, "GPU": 6.0},
        "rollout workers": {"CPU": 1.0, "GPU": 0.0},
        "scoring workers": {"CPU": 1.5, "GPU": 0.0},  # and the one that trains the SCM
        "learner ranks": {"CPU": 3.0, "GPU": 2.0},
    }


def test_a_machine_without_gpus_is_asked_for_none() -> None:
    overrides = ("policy_server.replicas=2", "learner.ranks=4")
    assert total_resources(config(*overrides))["GPU"] == 0.0


def test_scorers_share_a_gpu() -> None:
    assert total_resources(config("scoring.device=cuda", "scoring.workers=3"))["GPU"] == 1.0


@given(ranks=st.integers(1, 8), servers=st.integers(1, 8), workers=st.integers(1, 8), scorers=st.integers(1, 8))
def test_the_total_is_enough_and_a_little_less_is_not(ranks: int, servers: int, workers: int, scorers: int) -> None:
    asked = config(
        f"learner.ranks={ranks}",
        f"learner.minibatch={ranks * 8}",
        f"policy_server.replicas={servers}",
        f"rollout.workers={workers}",
        f"scoring.workers={scorers}",
    )
    needed = ranks + servers + 0.25 * workers + 0.25 * (scorers + 1)
    require_resources(asked, {"CPU": needed}, "here")
    with pytest.raises(CosoError, match=f"{needed:g} CPUs are needed"):
        require_resources(asked, {"CPU": needed - 0.25}, "here")


def test_what_is_short_is_said_by_kind_with_what_takes_it_and_what_to_do() -> None:
    asked = config("learner.ranks=4", "learner.device=cuda")
    with pytest.raises(CosoError) as error:
        require_resources(asked, {"CPU": 2.0}, "the cluster at 10.0.0.1:6379")
    for part in (
        "5.75 CPUs are needed (policy servers 1, rollout workers 0.25, scoring workers 0.5, learner ranks 4)",
        "4 GPUs are needed (learner ranks 4) but the cluster at 10.0.0.1:6379 has 0",
        "has 2",
        "learner.ranks",
        "cluster.oversubscribe",
    ):
        assert part in str(error.value)
    with pytest.raises(CosoError) as error:
        require_resources(asked, {"CPU": 64.0, "GPU": 2.0}, "here")
    assert "CPUs are needed" not in str(error.value) and "4 GPUs" in str(error.value)


@pytest.mark.parametrize(("oversubscribe", "cores", "offered"), [(2, 2, 4), (1.3, 2, 2), (0.1, 2, 1), (1, 1, 1)])
def test_what_this_machine_offers_is_what_ray_is_started_with(
    monkeypatch: pytest.MonkeyPatch, oversubscribe: float, cores: int, offered: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert local_cpus(config(f"cluster.oversubscribe={oversubscribe}")) == offered


@pytest.mark.parametrize(
    ("asked", "visible", "part"),
    [
        (("learner.ranks=1000", "learner.minibatch=1000"), "", "CPUs are needed"),
        (("learner.device=cuda",), "", "1 GPUs are needed (learner ranks 1) but this machine has 0"),
        (("learner.device=cuda",), "-1", "has 0"),
        (("learner.device=cuda", "policy_server.device=cuda", "policy_server.replicas=2"), "0,1", "has 2"),
    ],
)
def test_a_session_is_refused_before_ray_is_touched(
    monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], visible: str, part: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    touched: Any = None
    monkeypatch.setitem(sys.modules, "ray", touched)  # importing it would raise ImportError
    with pytest.raises(CosoError) as error, ray_session(config(*asked)):
        raise AssertionError("it started")
    assert part in str(error.value)


def test_environments_that_borrow_emulators_take_them_from_where_they_are() -> None:
    borrowing = ("environment.kwargs={driver: emulator}", "rollout.workers=2", "rollout.envs_per_worker=3")
    assert total_resources(config(*borrowing))["emulator"] == 6.0
    assert "emulator" not in total_resources(config())
    with pytest.raises(CosoError, match=r"6 emulators are needed .* but here has 4 .*coso fleet start"):
        require_resources(config(*borrowing), {"CPU": 64.0, "emulator": 4.0}, "here")


def test_logs_are_a_folder_only_if_there_are_some(tmp_path: Path) -> None:
    session = tmp_path / "session_2026" / "logs"
    session.mkdir(parents=True)
    (session / "worker-1.err").touch()
    _save_actor_logs(tmp_path, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    (session / "worker-2.err").write_text("why")
    _save_actor_logs(tmp_path, tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["worker-2.err"]
