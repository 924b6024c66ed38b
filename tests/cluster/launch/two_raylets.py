"""Two raylets on one machine with made-up GPUs: prints as JSON on which nodes and GPUs a plan's actors really started.

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

    def place(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()


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
    head = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, num_gpus=3, object_store_memory=STORE)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        words = ["learner.device=cuda", "learner.ranks=3", "learner.gpu_share=0.7", "scoring.device=cuda"]
        words += ["policy_server.device=cuda", "policy_server.tensor_parallel=2", "scoring.workers=2"]
        words += [f"cluster.{kind}_cpus=0.25" for kind in ("learner", "policy_server", "scorer", "rollout_worker")]
        words += ["rollout.workers=4"]
        config = load_config([], [*words, f"cluster.address={cluster.address}"])
        places = reserve(config)
        actors = {need.actor: start(places, need) for need in places.plan.placed}
        where = {actor: ray.get(handle.place.remote(), timeout=60) for actor, handle in actors.items()}
        started = {actor: node for actor, (node, _) in where.items()}
        gpus = {actor: [f"{node} {gpu}" for gpu in found] for actor, (node, found) in where.items()}
        planned = {need.actor: node for need, node in places.plan.placed.items()}
        try:
            reserve(load_config([], [*words, "policy_server.replicas=2", f"cluster.address={cluster.address}"]))
            refused = ""
        except CosoError as error:
            refused = str(error)
        driver = ray.get_runtime_context().get_node_id()
        found = {"started": started, "planned": planned, "gpus": gpus, "driver": driver, "refused": refused}
        print(json.dumps(found), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
