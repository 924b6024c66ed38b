"""The placement plan: what it promises for all clusters and runs, and where things go on some that people have."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.files import load_config
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.placement import (
    DRIVER_SIDE,
    LEAST_CPUS,
    Node,
    Plan,
    needs_of,
    place,
    require_placed,
    storage_roots,
    transport_of,
)
from cluster.launch.ray_runtime import total_resources

GPUS = ("policy_server.device=cuda", "learner.device=cuda")
UTILIZATION = "policy_server.gpu_memory_utilization=0.2"


def config(*overrides: str) -> RunConfig:
    return load_config([], overrides)


def cluster(*free: dict[str, float]) -> tuple[Node, ...]:
    """Nodes 10.0.0.1, 10.0.0.2, …; the command runs on the first."""
    return tuple(
        Node(name=f"node{number}", address=f"10.0.0.{number}", free=each, driver=number == 1)
        for number, each in enumerate(free, start=1)
    )


def planned(nodes: tuple[Node, ...], *overrides: str) -> Plan:
    return place(nodes, needs_of(config(*overrides)))


amounts = st.integers(0, 16).map(float)
offers = st.fixed_dictionaries(
    {"CPU": st.integers(0, 64).map(lambda n: n / 2)}, optional={"GPU": amounts, "emulator": amounts}
)
clusters = st.lists(offers, min_size=1, max_size=6).map(lambda free: cluster(*free))


@st.composite
def runs(draw: Any) -> RunConfig:
    counts = {
        key: draw(st.integers(1, 6))
        for key in ("policy_server.replicas", "learner.ranks", "scoring.workers", "rollout.workers")
    }
    words = [f"{key}={count}" for key, count in counts.items()]
    words += [f"cluster.{who}_cpus={draw(st.sampled_from([0, 0.25, 1, 3]))}" for who in ("learner", "policy_server")]
    words += [f"cluster.{who}_cpus={draw(st.sampled_from([0, 0.25, 1, 3]))}" for who in ("rollout_worker", "scorer")]
    if draw(st.booleans()):
        gpus = draw(st.sampled_from(["tensor_parallel=1", "tensor_parallel=4", "gpu_share=0.4", "gpu_share=0.6"]))
        words += ["policy_server.device=cuda", f"policy_server.{gpus}", "policy_server.gpu_memory_utilization=0.3"]
    words += [f"{stage}.device=cuda" for stage in ("learner", "scoring") if draw(st.booleans())]
    words += [f"learner.gpu_share={draw(st.sampled_from([0.7, 1]))}"]
    if draw(st.booleans()):
        words += ["environment.kwargs={driver: emulator}", "rollout.envs_per_worker=2"]
    return config(*words)


@given(nodes=clusters, run=runs())
def test_nothing_is_promised_twice_and_every_actor_is_placed_or_named(nodes: tuple[Node, ...], run: RunConfig) -> None:
    needs = needs_of(run)
    plan = place(nodes, needs)
    for node in nodes:
        room = plan.room(node)
        for kind, left in [*room.free.items(), *(("GPU", gpu) for gpu in room.gpus)]:
            assert left >= -1e-5, (node, kind, plan.on(node))
    assert Counter(needs) == Counter([*plan.placed, *plan.short])
    for need in plan.short:  # not without a reason
        assert not any(plan.room(node).count(need) for node in nodes), need
    assert place(nodes, needs) == plan


@given(nodes=clusters, run=runs(), where=st.integers(0, 6))
def test_what_fits_on_one_node_is_placed_whatever_the_other_nodes_are(
    nodes: tuple[Node, ...], run: RunConfig, where: int
) -> None:
    needs = needs_of(run)
    total = Counter[str]()
    for need in needs:
        total.update(need.takes)
    free = {kind: amount + 1e-3 for kind, amount in total.items()}
    free["GPU"] = float(sum(need.takes.get("GPU", 0) > 0 for need in needs)) + total["GPU"]  # some GPUs stay in parts
    enough = Node(name="enough", address="10.9.9.9", free=free)
    plan = place((*nodes[:where], enough, *nodes[where:]), needs)
    assert plan.short == ()
    require_placed(plan)


@given(nodes=clusters, ranks=st.integers(1, 40), device=st.sampled_from(["cpu", "cuda"]))
def test_ranks_are_on_as_few_nodes_as_can_hold_them(nodes: tuple[Node, ...], ranks: int, device: str) -> None:
    needs = needs_of(config(f"learner.ranks={ranks}", f"learner.device={device}"), "learner rank")
    plan = place(nodes, needs)
    rooms = [int(min(node.free.get(kind, 0.0) / amount for kind, amount in needs[0].takes.items())) for node in nodes]
    rooms.sort(reverse=True)
    assert len(plan.placed) == min(ranks, sum(rooms))
    used = len(set(plan.nodes_of("learner rank")))
    assert sum(rooms[: max(0, used - 1)]) < len(plan.placed) or used == 0


def test_four_nodes_with_one_gpu_are_no_place_for_a_server_that_needs_four() -> None:
    nodes = cluster(*[{"CPU": 8.0, "GPU": 1.0}] * 4)
    plan = planned(nodes, "policy_server.device=cuda", "policy_server.tensor_parallel=4")
    assert [need.actor for need in plan.short] == ["policy server 0"]
    with pytest.raises(CosoError) as error:
        require_placed(plan)
    message = str(error.value)
    assert (
        "policy server 0 needs" in message
        and "4 GPUs on one node" in message
        and "free are 1 GPU on each of 4 nodes (10.0.0.1, …)" in message
    )
    assert "\n" not in message
    assert (
        planned(cluster(*nodes_free(nodes), {"CPU": 8.0, "GPU": 4.0}), *GPUS, "policy_server.tensor_parallel=4").short
        == ()
    )


def nodes_free(nodes: tuple[Node, ...]) -> list[dict[str, float]]:
    return [dict(node.free) for node in nodes]


def test_a_server_over_several_gpus_and_the_ranks_each_get_a_node() -> None:
    plan = planned(
        cluster({"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}),
        *GPUS,
        "policy_server.tensor_parallel=4",
        "learner.ranks=4",
    )
    assert plan.short == ()
    assert len(set(plan.nodes_of("learner rank"))) == 1
    assert set(plan.nodes_of("learner rank")) != set(plan.nodes_of("policy server"))


def test_ranks_share_the_smallest_node_that_takes_all_of_them_else_as_few_as_possible() -> None:
    sizes = cluster({"CPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 2.0})
    one_server = ("learner.device=cuda", "learner.minibatch=64")
    assert planned(sizes, *one_server, "learner.ranks=3").nodes_of("learner rank") == ["node3"] * 3
    across = planned(sizes, *one_server, "learner.ranks=10").nodes_of("learner rank")
    assert across == ["node2"] * 8 + ["node4"] * 2


def test_ranks_prefer_the_drivers_node_and_engines_leave_it_to_them() -> None:
    """Checkpoints are then written where the run folder is."""
    plan = planned(
        cluster(*[{"CPU": 32.0, "GPU": 4.0}] * 2),
        *GPUS,
        "policy_server.replicas=2",
        "policy_server.tensor_parallel=2",
        "learner.ranks=4",
        "learner.minibatch=64",
    )
    assert set(plan.nodes_of("learner rank")) == {"node1"} and set(plan.nodes_of("policy server")) == {"node2"}
    on_cpus = planned(cluster({"CPU": 4.0}, {"CPU": 64.0}), "learner.ranks=2")
    assert set(on_cpus.nodes_of("learner rank")) == {"node1"}
    run_folder, model = storage_roots(config("learner.ranks=2"), on_cpus)
    assert not run_folder.shared and run_folder.nodes == ("node1",)
    assert model.shared and set(model.nodes) == {"node1", *on_cpus.nodes_of("policy server")}


def test_weights_travel_through_shared_memory_only_on_one_node() -> None:
    one, two = cluster({"CPU": 8.0}), cluster({"CPU": 1.5}, {"CPU": 8.0})
    assert transport_of(config(), planned(one)) == "shared_memory"
    assert planned(two).nodes_of("learner rank", "policy server") == ["node1", "node2"]
    assert transport_of(config(), planned(two)) == "object_store"
    beside = cluster({"CPU": 0.0}, {"CPU": 8.0})  # the driver, which removes the files, is on a head node without work
    assert transport_of(config(), planned(beside)) == "object_store"


def test_adapters_travel_without_nccl() -> None:
    adapters = (*GPUS, "learner.lora.rank=16", "model.dtype=bfloat16")
    for words, transport in ((GPUS, "nccl"), (adapters, "shared_memory"), ((*adapters, "learner.lora=null"), "nccl")):
        run = config(*words)
        assert transport_of(run, place(cluster({"CPU": 16.0, "GPU": 8.0}), needs_of(run))) == transport


def test_rollout_workers_go_to_all_nodes_by_their_cpus() -> None:
    even = planned(cluster(*[{"CPU": 32.0}] * 3), "rollout.workers=12")
    assert Counter(even.nodes_of("rollout worker")) == {"node1": 4, "node2": 4, "node3": 4}
    uneven = planned(cluster({"CPU": 8.0}, {"CPU": 32.0}), "rollout.workers=10")
    assert Counter(uneven.nodes_of("rollout worker")) == {"node1": 2, "node2": 8}


def test_workers_whose_environments_borrow_emulators_go_to_the_emulators() -> None:
    nodes = cluster({"CPU": 64.0}, {"CPU": 4.0, "emulator": 8.0}, {"CPU": 4.0, "emulator": 4.0})
    words = ("environment.kwargs={driver: emulator}", "rollout.envs_per_worker=4")
    assert Counter(planned(nodes, *words, "rollout.workers=3").nodes_of("rollout worker")) == {"node2": 2, "node3": 1}
    short = planned(nodes, *words, "rollout.workers=5")
    assert [need.actor for need in short.short] == ["rollout worker 3", "rollout worker 4"]
    with pytest.raises(CosoError, match=r"rollout workers 3 to 4 need each .*4 emulators.*coso fleet start"):
        require_placed(short)


def test_what_serves_the_driver_runs_with_it_even_where_nothing_is_free() -> None:
    plan = planned(cluster({}, {"CPU": 16.0}))
    assert plan.nodes_of(*DRIVER_SIDE) == ["node1", "node1"]
    assert set(plan.nodes_of("learner rank", "policy server", "rollout worker", "scorer")) == {"node2"}


def test_scorers_go_where_cpus_are_left_and_share_a_gpu_where_they_run_on_gpus() -> None:
    nodes = cluster({"CPU": 4.0, "GPU": 2.0}, {"CPU": 30.0})
    assert set(planned(nodes, *GPUS, "scoring.workers=4").nodes_of("scorer", "SCM trainer")) == {"node2"}
    on_gpu = planned(cluster({"CPU": 8.0, "GPU": 3.0}), *GPUS, "scoring.device=cuda", "scoring.workers=3")
    assert on_gpu.short == ()


@given(run=runs())
def test_the_needs_of_all_actors_are_what_is_checked_before_a_ray_is_started_here(run: RunConfig) -> None:
    total = Counter[str]()
    for need in needs_of(run):
        total.update(need.takes)
    for kind, amount in total_resources(run).items():
        assert amount - 1e-6 <= total[kind] <= amount + LEAST_CPUS * len(needs_of(run)) + 1e-6


def test_entropy_without_influence_starts_no_scorers() -> None:
    assert planned(cluster({"CPU": 8.0}), "entropy.mode=uniform").nodes_of("scorer", "SCM trainer") == []


def test_an_address_is_loopback_only_for_those_on_the_same_node() -> None:
    plan = planned(cluster({"CPU": 8.0}, {"CPU": 8.0}))
    assert plan.address_for("node2", ["node2", "node2"]) == "127.0.0.1"
    assert plan.address_for("node2", ["node2", "node1"]) == "10.0.0.2"
    assert plan.address_for("node2", ["node1"]) == "10.0.0.2"


def test_shares_of_a_gpu_are_never_joined() -> None:
    shares = ("policy_server.device=cuda", "policy_server.gpu_share=0.6", "policy_server.replicas=3", UTILIZATION)
    plan = planned(cluster({"CPU": 8.0, "GPU": 2.0}), *shares, "entropy.mode=none")
    assert [need.actor for need in plan.short] == ["policy server 2"]
    with pytest.raises(
        CosoError, match=r"policy server 2 needs 1 CPU and 0\.6 GPUs on one node, free are 0\.4 \+ 0\.4 GPUs"
    ):
        require_placed(plan)
    assert not planned(cluster({"CPU": 8.0, "GPU": 3.0}), *shares).short


def test_learner_server_and_scorers_share_one_gpu_and_then_weights_do_not_travel_by_nccl() -> None:
    words = (
        *GPUS,
        "scoring.device=cuda",
        "learner.gpu_share=0.3",
        "policy_server.gpu_share=0.2",
        "scoring.workers=1",
        UTILIZATION,
    )
    run = config(*words)
    plan = place(cluster({"CPU": 16.0, "GPU": 1.0}), needs_of(run))
    assert not plan.short and plan.room(plan.nodes[0]).gpus == pytest.approx([0.0])
    assert transport_of(run, plan) == "shared_memory"
    assert total_resources(run)["GPU"] == pytest.approx(1.0)
    with pytest.raises(CosoError, match="nccl needs a GPU for each process"):
        config(*words, "weight_sync.transport=nccl")


def test_ranks_fill_a_started_gpu_only_if_they_can_and_servers_take_what_they_leave() -> None:
    plan = planned(
        cluster({"CPU": 16.0, "GPU": 2.0}),
        *GPUS,
        "learner.ranks=2",
        "learner.gpu_share=0.6",
        "policy_server.replicas=2",
        "policy_server.gpu_share=0.4",
        UTILIZATION,
    )
    assert not plan.short


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("policy_server.tensor_parallel=2", "policy_server.gpu_share=0.5"), "needs whole GPUs"),
        (("learner.ranks=2", "learner.gpu_share=0.5"), "NCCL refuses"),
        (("learner.gpu_share=0",), "learner.gpu_share"),
        (("policy_server.gpu_share=1.5",), "policy_server.gpu_share"),
    ],
)
def test_shares_that_cannot_be_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(CosoError, match=message):
        config(*GPUS, *words)
