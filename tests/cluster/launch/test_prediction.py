"""What a plan will yield: the formulas on cases that one can count by hand, and what must hold for all rates."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.files import load_config
from cluster.errors import CosoError
from cluster.launch.placement import Node, needs_of, place
from cluster.launch.prediction import Prediction, Rates, changes, predict

RATES = Rates(environment_s=0.9, first_answer_s=0.1, further_answer_s=0.0, rank_s=0.01)


def machine(cores: float | None = None, cpus: float = 64.0) -> tuple[Node, ...]:
    return (Node(name="here", address="127.0.0.1", free={"CPU": cpus}, cores=cores, driver=True),)


def predicted(rates: Rates, *overrides: str, nodes: tuple[Node, ...] | None = None) -> Prediction:
    config = load_config([], ("training.steps_per_update=100", "rollout.envs_per_worker=16", *overrides))
    return predict(config, place(nodes or machine(), needs_of(config)), rates)


def test_environments_that_wait_for_nobody_limit_by_their_own_time() -> None:
    """16 environments, each a step a second."""
    found = predicted(RATES)
    assert found.steps_per_s == pytest.approx(16.0) and found.limiting == "environments"
    assert found.limits["learner"] == pytest.approx(100.0)


def test_a_server_with_more_requests_than_it_can_answer_limits() -> None:
    """A further answer every 0.1 s: 10 steps/s at most; a second server doubles that."""
    rates = RATES.model_copy(update={"environment_s": 0.0, "further_answer_s": 0.1})
    one, two = predicted(rates), predicted(rates, "policy_server.replicas=2")
    assert one.limiting == two.limiting == "policy servers"
    assert one.steps_per_s == pytest.approx(10.0) and two.steps_per_s == pytest.approx(20.0)


def test_answers_take_longer_the_more_ask_at_once() -> None:
    """e = g at 4 of 8 requests at once: 1 + (4 − 1) · 1 = 4 s, and 8 / (4 + 4) steps a second."""
    rates = RATES.model_copy(update={"environment_s": 4.0, "first_answer_s": 1.0, "further_answer_s": 1.0})
    assert predicted(rates, "rollout.envs_per_worker=8").steps_per_s == pytest.approx(1.0)


def test_ranks_share_an_update_but_not_the_publishing_of_its_weights() -> None:
    """An update of 100 steps: 10 s of ranks, and 2 s that they do not share."""
    rates = RATES.model_copy(update={"rank_s": 0.1, "publish_s": 2.0})
    assert predicted(rates).steps_per_s == pytest.approx(100 / 12)
    assert predicted(rates, "learner.ranks=5").steps_per_s == pytest.approx(16.0)  # the environments limit now
    assert predicted(rates, "learner.ranks=5").limits["learner"] == pytest.approx(100 / 4)


def test_in_sync_mode_the_stages_take_turns_and_the_scm_learns_before_it_scores() -> None:
    """100 steps: 100/16 s of rollouts, 1 s of scoring, 2 s of training the SCM, 1 s of the learner."""
    rates = RATES.model_copy(update={"scorer_s": 0.01, "scm_training_s": 2.0})
    assert predicted(rates, "mode=sync").steps_per_s == pytest.approx(100 / (100 / 16 + 1 + 2 + 1))
    assert predicted(rates, "mode=async").limits["SCM trainer"] == pytest.approx(50.0)  # it scores meanwhile
    half = rates.model_copy(update={"lock_step": 0.5})
    assert predicted(half, "mode=sync").steps_per_s == pytest.approx(100 / (100 / 8 + 1 + 2 + 1))
    assert predicted(half, "mode=async").steps_per_s == pytest.approx(16.0)


def test_cores_limit_all_stages_together_in_async_mode_and_each_alone_in_sync_mode() -> None:
    """Two cores; a step takes 0.3 core-seconds of rollouts and 0.1 of the learner."""
    rates = RATES.model_copy(
        update={"core_s": {"rollout worker": 0.2, "policy server": 0.1, "learner rank": 0.1}, "environment_s": 0.0}
    )
    overlapping = predicted(rates, nodes=machine(cores=2.0))
    assert overlapping.limiting == "cores of 127.0.0.1" and overlapping.steps_per_s == pytest.approx(2 / 0.4)
    in_turns = predicted(rates, "mode=sync", nodes=machine(cores=2.0))
    assert in_turns.steps_per_s == pytest.approx(1 / (0.3 / 2 + 0.1 / 2))


def test_actors_on_another_node_take_its_cores() -> None:
    rates = RATES.model_copy(update={"core_s": {"rollout worker": 0.4}, "environment_s": 0.0, "first_answer_s": 0.001})
    two = tuple(
        Node(name=f"n{i}", address=f"10.0.0.{i}", free={"CPU": 4.0}, cores=2.0, driver=i == 0) for i in range(2)
    )
    words = ("rollout.workers=2", "rollout.envs_per_worker=8", "cluster.rollout_worker_cpus=1")
    assert predicted(rates, *words, nodes=machine(cores=2.0)).steps_per_s == pytest.approx(5.0)
    assert predicted(rates, *words, nodes=two).steps_per_s == pytest.approx(10.0)


def test_what_one_more_of_each_would_change_or_why_there_is_no_room_for_it() -> None:
    rates = RATES.model_copy(update={"further_answer_s": 0.1, "scorer_s": 0.01})
    config = load_config([], ("training.steps_per_update=100", "rollout.envs_per_worker=16", "learner.minibatch=64"))
    found = {change.what: change for change in changes(config, machine(cpus=3.0), rates)}
    assert list(found) == [
        "one more policy server",
        "one more learner rank",
        "one more scorer",
        "64 more environments (4 rollout workers)",
    ]
    assert found["one more policy server"].prediction is None
    assert "SCM trainer 0 needs 0.25 CPUs on one node" in found["one more policy server"].short
    scorer = found["one more scorer"].prediction
    assert scorer is not None and scorer.limits["scorers"] == pytest.approx(200.0)


positive = st.floats(1e-4, 10.0)


def rates_of(first_answer_s: float, further: float, **rest: float) -> Rates:
    """further: what a further request adds, as a share of the first; above 1, requests one by one would be faster."""
    return Rates(first_answer_s=first_answer_s, further_answer_s=first_answer_s * further, **rest)


@given(
    rates=st.builds(
        rates_of,
        environment_s=st.floats(0.0, 10.0),
        first_answer_s=positive,
        further=st.floats(0.0, 1.0),
        scorer_s=st.floats(0.0, 1.0),
        scm_training_s=st.floats(0.0, 10.0),
        rank_s=positive,
        publish_s=st.floats(0.0, 10.0),
    ),
    mode=st.sampled_from(["sync", "async"]),
    more=st.sampled_from(["policy_server.replicas", "learner.ranks", "scoring.workers", "rollout.workers"]),
)
def test_more_actors_are_never_slower_and_nothing_is_faster_than_its_slowest_stage(
    rates: Rates, mode: str, more: str
) -> None:
    before, after = (predicted(rates, f"mode={mode}", f"{more}={count}") for count in (1, 2))
    assert after.steps_per_s >= before.steps_per_s * (1 - 1e-9)
    assert 0 < before.steps_per_s <= min(before.limits.values()) * (1 + 1e-9)
    assert before.limits[before.limiting.split(" and ")[0]] == min(before.limits.values())


def test_rates_are_written_and_read_and_another_file_is_refused(tmp_path: Path) -> None:
    rates: Any = RATES.model_copy(update={"core_s": {"scorer": 0.5}})
    rates.write(tmp_path / "rates.json")
    assert Rates.read(tmp_path / "rates.json") == rates
    (tmp_path / "other.json").write_text('{"speed": 3}')
    with pytest.raises(CosoError, match="other.json holds no rates"):
        Rates.read(tmp_path / "other.json")
    with pytest.raises(CosoError, match="--measure --rates .*none.json"):
        Rates.read(tmp_path / "none.json")


def simulated(environments: int, servers: int, rates: Rates, steps: int, seed: int) -> float:
    """Steps a second of environments with lognormal steps and servers that share their time: a request that is one of k
    makes 1 / (first + (k − 1) · further) of its way a second."""
    random, now, made = Random(seed), 0.0, 0
    stepping = {env: random.uniform(0, rates.environment_s) for env in range(environments)}  # -> when it asks
    asking: list[dict[int, float]] = [{} for _ in range(servers)]  # env -> share of its answer that is left
    while made < steps:
        speeds = [
            1 / (rates.first_answer_s + (len(each) - 1) * rates.further_answer_s) if each else 0 for each in asking
        ]
        ends = [now + min(each.values()) / speed for each, speed in zip(asking, speeds, strict=True) if each]
        until = min([*ends, *stepping.values()])
        for each, speed in zip(asking, speeds, strict=True):
            for env in each:
                each[env] -= (until - now) * speed
        now = until
        for each in asking:
            for env in [env for env, left in each.items() if left < 1e-9]:
                del each[env]
                made += 1
                stepping[env] = now + rates.environment_s * random.lognormvariate(-0.125, 0.5)
        for env in [env for env, when in stepping.items() if when <= now]:
            del stepping[env]
            asking[env % servers][env] = 1.0
    return made / now


@pytest.mark.parametrize(
    ("environments", "servers", "further_s"),
    [
        (8, 1, 0.02),  # environments limit
        (64, 1, 0.02),  # the server is busy about as long as they are
        (64, 2, 0.02),
        (200, 2, 0.05),  # servers limit
    ],
)
def test_the_formula_of_rollouts_is_close_to_a_simulation_of_them(
    environments: int, servers: int, further_s: float
) -> None:
    rates = RATES.model_copy(update={"environment_s": 2.0, "first_answer_s": 0.3, "further_answer_s": further_s})
    words = (f"rollout.envs_per_worker={environments}", f"policy_server.replicas={servers}", "entropy.mode=uniform")
    rollouts = min(rate for name, rate in predicted(rates, *words).limits.items() if name != "learner")
    made = simulated(environments, servers, rates, steps=40 * environments, seed=1)
    assert rollouts == pytest.approx(made, rel=0.05)
