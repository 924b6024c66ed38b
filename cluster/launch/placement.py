"""The placement plan: which actor runs on which node. A pure function of what is free and what is needed.

`place` is given the nodes with their free resources and the actors with their needs. The same input gives the same
plan, no node is promised more than it has free, and every actor is either placed or named as short. No Ray is needed
here; `cluster.launch.reservation` makes Ray start the actors where the plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

from actors.addresses import address_for
from actors.settings import Transport
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.ray_runtime import EMULATOR, emulators_per_worker, scoring_gpus

Kind = Literal[
    "policy server", "learner rank", "SCM trainer", "scorer", "rollout worker", "trajectory stream", "weight registry"
]
#: They serve the driver all the time and take no resources, so they run on its node.
DRIVER_SIDE: tuple[Kind, ...] = ("trajectory stream", "weight registry")
#: Each actor takes at least so much of a CPU: Ray's placement groups have no empty bundles.
LEAST_CPUS = 0.001
#: What sums of fractions may be off by. Ray itself counts resources in ten-thousandths.
TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the cluster.

    name: Ray's node id, or the name in the user's file. free: resources that nobody holds, as Ray counts them. cores:
    CPU cores, None where not known; a Ray that we start offers more CPUs than that. driver: whether the command runs
    there. gpu_bytes, host_bytes: memory of each of its GPUs, and its own; None where not known.
    """

    name: str
    address: str
    free: Mapping[str, float] = field(hash=False)
    cores: float | None = None
    driver: bool = False
    gpu_bytes: float | None = None
    host_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Need:
    """An actor, and what it takes of one node."""

    kind: Kind
    index: int
    takes: Mapping[str, float] = field(hash=False)

    @property
    def actor(self) -> str:
        """Its name in messages, for instance `policy server 0`."""
        return f"{self.kind} {self.index}"


class Room:
    """What is free on a node while actors are placed. free: amounts by resource, GPUs in all; gpus: the free share of
    each GPU, 0 to 1.

    Ray tells the sum of a node's free GPUs only: all are taken to be whole but one. As in Ray, an actor with a share
    of a GPU gets the fullest one that has room for it, and one with more gets whole GPUs.
    """

    def __init__(self, node: Node) -> None:
        self.free = dict(node.free)
        whole, rest = divmod(self.free.get("GPU", 0.0), 1.0)
        self.gpus = [1.0] * int(whole) + ([rest] if rest else [])

    def count(self, need: Need) -> int:
        """How many such actors fit; 1 of one that takes nothing."""
        counts = [
            self._count_gpus(amount) if kind == "GPU" else int((self.free.get(kind, 0.0) + TOLERANCE) / amount)
            for kind, amount in need.takes.items()
        ]
        return min(counts, default=1)

    def take(self, need: Need) -> None:
        """Give an actor that fits its resources."""
        for kind, amount in need.takes.items():
            self.free[kind] = self.free.get(kind, 0.0) - amount
        wanted = need.takes.get("GPU", 0.0)
        while wanted > TOLERANCE:
            share = min(wanted, 1.0)
            fullest = min(gpu for gpu in self.gpus if gpu + TOLERANCE >= share)
            self.gpus[self.gpus.index(fullest)] -= share
            wanted -= share

    def lacks(self, need: Need) -> str:
        """What is free of the resources that the actor needs more of: `2 CPUs`, `0.4 + 0.4 GPUs`."""
        lacking = [kind for kind, amount in need.takes.items() if not self.count(replace(need, takes={kind: amount}))]
        return " and ".join(self._amount(kind) for kind in lacking)

    def _count_gpus(self, amount: float) -> int:
        if amount < 1.0:
            return sum(int((gpu + TOLERANCE) / amount) for gpu in self.gpus)
        return int(sum(gpu + TOLERANCE >= 1.0 for gpu in self.gpus) / amount)

    def _amount(self, kind: str) -> str:
        free = max(0.0, self.free.get(kind, 0.0))
        started = [gpu for gpu in self.gpus if TOLERANCE < gpu < 1.0 - TOLERANCE]
        if kind == "GPU" and started:
            return " + ".join(f"{gpu:g}" for gpu in self.gpus if gpu > TOLERANCE) + " GPUs"
        return f"{free:g} {_plural(kind, free)}"


@dataclass(frozen=True, kw_only=True)
class StorageRoot:
    """A folder, and the names of the nodes that read or write it."""

    what: str
    path: str
    nodes: tuple[str, ...]

    @property
    def shared(self) -> bool:
        """Whether several nodes must see the same files there."""
        return len(self.nodes) > 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each actor runs.

    placed: need -> name of its node, in the order of the needs. short: the needs for which no node has room.
    """

    nodes: tuple[Node, ...]
    placed: Mapping[Need, str]
    short: tuple[Need, ...] = ()

    def on(self, node: Node) -> list[Need]:
        """The actors of a node."""
        return [need for need, name in self.placed.items() if name == node.name]

    def room(self, node: Node) -> Room:
        """What stays free on a node."""
        room = Room(node)
        for need in self.on(node):
            room.take(need)
        return room

    def nodes_of(self, *kinds: Kind) -> list[str]:
        """The nodes of all placed actors of these kinds, one for each actor."""
        return [name for need, name in self.placed.items() if need.kind in kinds]

    def address_for(self, owner: str, audience: Iterable[str]) -> str:
        """The address at which actors on the nodes `audience` reach one on the node `owner`."""
        addresses = {node.name: node.address for node in self.nodes}
        return address_for(addresses[owner], (addresses[name] for name in audience))


def needs_of(config: RunConfig, *kinds: Kind) -> tuple[Need, ...]:
    """The actors of a run, the hardest to place first. kinds: of these kinds only; none: all."""
    cluster, server = config.cluster, config.policy_server
    scorers = config.scoring.workers if config.entropy.needs_influence else 0
    scoring = {"CPU": cluster.scorer_cpus, "GPU": scoring_gpus(config)}
    learning = {"CPU": cluster.learner_cpus, "GPU": config.learner.gpus}
    rolling = {"CPU": cluster.rollout_worker_cpus, **emulators_per_worker(config)}
    serving = {"CPU": cluster.policy_server_cpus, "GPU": server.gpus}
    table: list[tuple[Kind, int, dict[str, float]]] = [
        ("learner rank", config.learner.ranks, learning),
        ("SCM trainer", min(1, scorers), scoring),
        ("scorer", scorers, scoring),
        ("rollout worker", config.rollout.workers, rolling),
        *((kind, 1, {}) for kind in DRIVER_SIDE),
    ]
    # An engine over several GPUs cannot be divided, while ranks can; one on one GPU takes what the ranks leave.
    table.insert(0 if server.gpus > 1 else 1, ("policy server", server.replicas, serving))
    return tuple(
        Need(kind=kind, index=index, takes=_takes(kind, takes))
        for kind, count, takes in table
        if not kinds or kind in kinds
        for index in range(count)
    )


def place(nodes: Sequence[Node], needs: Sequence[Need]) -> Plan:
    """The plan for these needs. One node is the driver's.

    Learner ranks share as few nodes as possible, best the driver's. What takes GPUs goes where the fewest others stay
    free, so that large places remain. The rest goes where the most is free; rollout workers are shared out by the
    nodes' CPUs.

    Where something stays short, policy servers and ranks change their turns once: the better plan counts.
    """
    plan = _place(nodes, needs)
    if not plan.short:
        return plan
    other = _place(nodes, sorted(needs, key=lambda need: need.kind != "learner rank"))
    return plan if len(plan.short) <= len(other.short) else other


def require_placed(plan: Plan) -> None:
    """Raise `CosoError`: one line that names what cannot be placed, and what is free where."""
    if plan.short:
        raise CosoError(
            f"cannot be placed: {shortage(plan)}. Ask for fewer (learner.ranks, policy_server.replicas, "
            "scoring.workers, rollout.workers), give each less (cluster.*_cpus, policy_server.tensor_parallel), or add "
            "nodes; `coso plan` shows what goes where."
        )


def shortage(plan: Plan) -> str:
    """What is short, and what the nodes still have of it: `policy server 0 needs 1 CPU and 4 GPUs on one node, free are
    1 GPU on each of 4 nodes (10.0.0.1, …)`. "" if nothing is short."""
    parts = []
    for _, group in groupby(plan.short, key=lambda need: need.kind):
        needs = list(group)
        first, last = needs[0], needs[-1]
        who = first.actor if len(needs) == 1 else f"{first.kind}s {first.index} to {last.index}"
        each = "needs" if len(needs) == 1 else "need each"
        wanted = " and ".join(f"{amount:g} {_plural(kind, amount)}" for kind, amount in first.takes.items())
        if EMULATOR in first.takes:
            wanted += " (offered where `coso fleet start` was run)"
        rooms: dict[str, list[str]] = {}
        for node in plan.nodes:
            rooms.setdefault(plan.room(node).lacks(first), []).append(node.address)
        free = ", ".join(f"{room} on {_few(addresses)}" for room, addresses in rooms.items())
        parts.append(f"{who} {each} {wanted} on one node, free are {free}")
    return "; ".join(parts)


def storage_roots(config: RunConfig, plan: Plan) -> list[StorageRoot]:
    """The folders of a run. Nodes that share one must see the same files at its path."""
    driver = [node.name for node in plan.nodes if node.driver]
    ranks, servers = plan.nodes_of("learner rank"), plan.nodes_of("policy server")

    def root(what: str, path: str, nodes: Iterable[str]) -> StorageRoot:
        return StorageRoot(what=what, path=path, nodes=tuple(dict.fromkeys(nodes)))

    return [
        root("run folder", f"{config.folder}/{config.name}", [*driver, *ranks]),  # ranks write checkpoints into it
        root("model", config.model.path, [*driver, *ranks, *servers]),
    ]


def transport_of(config: RunConfig, plan: Plan) -> Transport:
    """How new weights travel to the engines. The driver removes files in shared memory, so those need its node."""
    hosts = {*plan.nodes_of("policy server", "learner rank"), *(node.name for node in plan.nodes if node.driver)}
    return config.weight_sync.transport_for(
        # Adapters are small: a broadcast is not worth a group of all engines and the learner.
        on_gpus=config.policy_server.device == config.learner.device == "cuda"
        and not config.shares_gpus
        and config.learner.served_adapters is None,
        nodes=len(hosts),
    )


def _place(nodes: Sequence[Node], needs: Sequence[Need]) -> Plan:
    rooms = {node.name: Room(node) for node in nodes}
    placed: dict[Need, str] = {}
    short = []
    workers = dict.fromkeys(rooms, 0)
    for kind, group in groupby(needs, key=lambda need: need.kind):
        same = list(group)
        for position, need in enumerate(same):
            fitting = [node for node in nodes if rooms[node.name].count(need)]
            if kind in DRIVER_SIDE:
                fitting = [node for node in nodes if node.driver]
            if not fitting:
                short.append(need)
                continue
            if kind == "learner rank":
                chosen = min(fitting, key=_packing(rooms, same[position:], placed))
            elif kind == "rollout worker":
                chosen = min(fitting, key=lambda node: (workers[node.name] + 1) / (node.free.get("CPU", 0.0) or 1.0))
                workers[chosen.name] += 1
            elif need.takes.get("GPU"):
                chosen = min(fitting, key=lambda node: (rooms[node.name].free["GPU"], node.driver))
            else:
                chosen = min(fitting, key=_emptiest(rooms))
            placed[need] = chosen.name
            rooms[chosen.name].take(need)
    return Plan(nodes=tuple(nodes), placed=placed, short=tuple(short))


def _packing(
    rooms: Mapping[str, Room], ranks: Sequence[Need], placed: Mapping[Need, str]
) -> Callable[[Node], tuple[float, ...]]:
    """The order of nodes for the next of `ranks`: one that has ranks already; one that takes all of them, best the
    driver's, else the tightest; else the one that takes the most."""
    begun = {name for need, name in placed.items() if need.kind == "learner rank"}

    def key(node: Node) -> tuple[float, ...]:
        free, count = rooms[node.name].free, rooms[node.name].count(ranks[0])
        takes_all = count >= len(ranks)
        return (
            node.name not in begun,
            not takes_all,
            takes_all and not node.driver,  # checkpoints then need no folder that nodes share
            free.get("GPU", 0.0) if takes_all else -count,
            -free.get("CPU", 0.0),
        )

    return key


def _emptiest(rooms: Mapping[str, Room]) -> Callable[[Node], tuple[float, ...]]:
    """The order of nodes for what takes CPUs only: where the most is free, before that where no GPU is."""
    return lambda node: (-rooms[node.name].free.get("CPU", 0.0), rooms[node.name].free.get("GPU", 0.0))


def _takes(kind: Kind, takes: Mapping[str, float]) -> dict[str, float]:
    if kind in DRIVER_SIDE:
        return {}
    return {"CPU": max(LEAST_CPUS, takes["CPU"])} | {
        other: amount for other, amount in takes.items() if amount and other != "CPU"
    }


def _few(addresses: Sequence[str]) -> str:
    """`10.0.0.1`, `10.0.0.1 and 10.0.0.2`, `each of 5 nodes (10.0.0.1, …)`."""
    return " and ".join(addresses) if len(addresses) < 3 else f"each of {len(addresses)} nodes ({addresses[0]}, …)"


def _plural(kind: str, amount: float) -> str:
    return f"{kind}{'' if amount == 1 else 's'}"
