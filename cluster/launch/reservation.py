"""The placement plan carried out: the nodes of a running Ray, and placement groups that hold what the plan says.

Everything is reserved before any actor starts, so a run either has all that it needs or ends with one line. Learner
ranks share one group (STRICT_PACK where the plan has them on one node, else PACK), and every other actor has a group of
its own that prefers its node. If that node dies, Ray moves the group, and restarts the actor on another.
Groups end with the driver's connection to Ray.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.nodes import cluster_nodes
from cluster.launch.placement import DRIVER_SIDE, Kind, Need, Plan, needs_of, place, require_placed

#: Another run that has just ended, or ends now, gives its resources back within this time, seconds.
FREE_DEADLINE_S = 10.0
#: Ray creates a group at once if there is room, seconds.
GROUP_DEADLINE_S = 30.0


class Reservation:
    """The groups of a plan. plan: where the groups really are, which differs from the plan that was asked for only
    where somebody else took the room meanwhile."""

    def __init__(self, plan: Plan) -> None:
        """Raises `CosoError` that names what could not be reserved."""
        self._groups: dict[str, tuple[Any, int]] = {}  # actor -> placement group and number of its bundle
        ranks = [need for need in plan.placed if need.kind == "learner rank"]
        for need in plan.placed:
            if need.kind not in (*DRIVER_SIDE, "learner rank"):
                self._reserve([need], plan)
            elif ranks and need == ranks[0]:
                self._reserve(ranks, plan)
        nodes = self._wait()
        self.plan = replace(plan, placed={need: nodes.get(need.actor, name) for need, name in plan.placed.items()})
        self._driver = next(node.name for node in plan.nodes if node.driver)

    def strategy(self, kind: Kind, index: int = 0) -> Any:
        """Ray's scheduling strategy for an actor."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        if kind in DRIVER_SIDE:  # hard: else Ray starts an actor that takes nothing on any node
            return NodeAffinitySchedulingStrategy(self._driver, soft=False)
        group, bundle = self._groups[f"{kind} {index}"]
        return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)

    @property
    def ranks_group(self) -> Any:
        """The placement group of the learner: one bundle for each rank."""
        return self._groups["learner rank 0"][0]

    def _wait(self) -> dict[str, str]:
        """Wait until Ray has made all groups; returns the node of each actor that has a bundle."""
        from ray.util.placement_group import placement_group_table

        ends = time.monotonic() + GROUP_DEADLINE_S
        while True:
            tables = {actor: placement_group_table(group) for actor, (group, _) in self._groups.items()}
            late = [actor for actor, table in tables.items() if table["state"] != "CREATED"]
            if not late:
                return {actor: table["bundles_to_node_id"][self._groups[actor][1]] for actor, table in tables.items()}
            if time.monotonic() > ends:
                raise CosoError(
                    f"Ray did not reserve room for {', '.join(late)} within {GROUP_DEADLINE_S:.0f} s, though it was "
                    "free a moment before: another job took it, or holds shares of several GPUs. Try again; "
                    "`coso plan` shows what is free"
                )
            time.sleep(0.1)

    def _reserve(self, needs: Sequence[Need], plan: Plan) -> None:
        from ray.util.placement_group import placement_group

        nodes = {plan.placed[need] for need in needs}
        bundles = [dict(need.takes) for need in needs]
        if len(nodes) == 1:
            group = placement_group(bundles, strategy="STRICT_PACK", _soft_target_node_id=nodes.pop())
        else:
            group = placement_group(bundles, strategy="PACK")
        for bundle, need in enumerate(needs):
            self._groups[need.actor] = (group, bundle)


def reserve(config: RunConfig, *kinds: Kind) -> Reservation:
    """Plan for the Ray that runs, and reserve. kinds: actors of these kinds only; none: all of a run's.

    Raises `CosoError`: one line that names what cannot be placed.
    """
    needs = needs_of(config, *kinds)
    ends = time.monotonic() + FREE_DEADLINE_S
    while True:
        plan = place(cluster_nodes(config), needs)
        if not plan.short:
            return Reservation(plan)
        if time.monotonic() > ends or place(cluster_nodes(config, free=False), needs).short:
            require_placed(plan)
        time.sleep(0.5)
