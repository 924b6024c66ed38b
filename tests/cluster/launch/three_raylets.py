"""Three raylets on one machine, two of them with made-up GPUs: prints as JSON where a plan's actors really started.

`test_reservation.py` runs it in a process of its own, since a process has one Ray.
"""

from __future__ import annotations

import json
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cluster.config.files import load_config
from cluster.errors import CosoError
from cluster.launch.placement import Need
from cluster.launch.reservation import Reservation, reserve

STORE = 80 << 20


class Here:
    """An actor that says where it is."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def start(places: Reservation, need: Need) -> Any:
    takes = dict(need.takes)
    in_ray: Any = ray.remote
    return in_ray(
        num_cpus=takes.pop("CPU", 0.0),
        num_gpus=takes.pop("GPU", 0.0),
        resources=takes,
        scheduling_strategy=places.strategy(need.kind, need.index),
    )(Here).remote()


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": STORE})
    cluster.add_node(num_cpus=2, num_gpus=4, object_store_memory=STORE)
    cluster.add_node(num_cpus=2, num_gpus=2, object_store_memory=STORE)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        words = ["learner.device=cuda", "learner.ranks=3", "policy_server.device=cuda", "cluster.learner_cpus=0.25"]
        words += ["policy_server.tensor_parallel=2", "cluster.policy_server_cpus=0.25", "rollout.workers=4"]
        config = load_config([], [*words, f"cluster.address={cluster.address}"])
        places = reserve(config)
        actors = {need.actor: start(places, need) for need in places.plan.placed}
        started = {actor: ray.get(handle.node.remote(), timeout=60) for actor, handle in actors.items()}
        planned = {need.actor: node for need, node in places.plan.placed.items()}
        try:
            reserve(load_config([], [*words, "policy_server.replicas=2", f"cluster.address={cluster.address}"]))
            refused = ""
        except CosoError as error:
            refused = str(error)
        driver = ray.get_runtime_context().get_node_id()
        print(json.dumps({"started": started, "planned": planned, "driver": driver, "refused": refused}), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
