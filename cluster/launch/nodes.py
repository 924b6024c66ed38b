"""The nodes that a plan is made for: of the Ray that runs, this machine alone, or those that a file describes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.placement import Node
from cluster.launch.ray_runtime import EMULATOR, local_cores, local_resources
from envs.settings import NonNegative, Section

GIB = 2**30


class NodeOffer(Section):
    """A node, or several that are alike, in the file of `coso plan --nodes`."""

    name: str
    count: PositiveInt = 1  # of such nodes; they are called NAME-1, NAME-2, …
    cpus: NonNegative
    gpus: NonNegative = 0.0
    emulators: NonNegative = 0.0
    cores: PositiveFloat | None = None  # None: as many as cpus
    gpu_memory: PositiveFloat | None = None  # GiB, of each GPU
    memory: PositiveFloat | None = None  # GiB
    address: str | None = None  # None: the name
    driver: bool = False  # whether the command is to run there; by default on the first node


class NodesFile(Section):
    """The whole file: `nodes: [{name: gpu, count: 4, cpus: 64, gpus: 8}, {name: box, cpus: 16, emulators: 12}]`."""

    nodes: list[NodeOffer] = Field(min_length=1)


def read_nodes(path: Path) -> tuple[Node, ...]:
    """The nodes of a file. Raises `CosoError` that says what is wrong with it."""
    try:
        offers = NodesFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).nodes
    except FileNotFoundError:
        raise CosoError(f"the file of nodes {path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise CosoError(f"the file of nodes {path} cannot be read: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise CosoError(
            f"the file of nodes {path}: {where}: {problem['msg']}. A node has name, cpus, and where it has them gpus, "
            "emulators; several alike have a count: `nodes: [{name: gpu, count: 4, cpus: 64, gpus: 8}]`"
        ) from None
    driving = sum(offer.driver for offer in offers)
    if driving > 1 or any(offer.driver and offer.count > 1 for offer in offers):
        raise CosoError(f"the file of nodes {path} names several nodes as driver: the command runs on one")
    nodes = [_node(offer, number) for offer in offers for number in range(1, offer.count + 1)]
    if len({node.name for node in nodes}) < len(nodes):
        raise CosoError(f"the file of nodes {path} has two nodes of the same name")
    if not driving:
        nodes[0] = replace(nodes[0], driver=True)
    return tuple(nodes)


def local_node(config: RunConfig) -> tuple[Node, ...]:
    """This machine, as the one node of a Ray that we start here."""
    free = local_resources(config)
    return (
        Node(
            name="local",
            address="127.0.0.1",
            free=free,
            cores=float(local_cores()),
            driver=True,
            host_bytes=psutil.virtual_memory().total,
        ),
    )


def cluster_nodes(config: RunConfig, free: bool = True) -> tuple[Node, ...]:
    """The live nodes of the Ray that this process is connected to, the driver's first, then by address. free: with what
    nobody holds now; else with all that each node offers."""
    import ray
    from ray._private.state import available_resources_per_node

    available = available_resources_per_node() if free else {}
    here = ray.get_runtime_context().get_node_id()
    ours = config.cluster.address is None  # such a Ray offers more CPUs than this machine has cores
    nodes = [
        Node(
            name=node["NodeID"],
            address=node["NodeManagerAddress"],
            free=_countable(available.get(node["NodeID"], node["Resources"])),
            cores=float(local_cores()) if ours else node["Resources"].get("CPU"),
            driver=node["NodeID"] == here,
            # What Ray offers of it; it leaves the rest to the system.
            host_bytes=node["Resources"].get("memory", 0) + node["Resources"].get("object_store_memory", 0) or None,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return tuple(sorted(nodes, key=lambda node: (not node.driver, node.address, node.name)))


def _countable(resources: dict[str, float]) -> dict[str, float]:
    """Without what Ray counts for itself: memory, object store, addresses of nodes, bundles of placement groups."""
    return {kind: float(amount) for kind, amount in resources.items() if kind in ("CPU", "GPU", EMULATOR)}


def with_gpu_memory(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """The nodes with the memory of this machine's GPUs, the smallest one's, told of its node; those of others are not
    known. Where there are GPUs, it starts CUDA in this process."""
    if not any(node.driver and node.free.get("GPU") for node in nodes):
        return nodes
    import torch

    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return tuple(replace(node, gpu_bytes=min(sizes)) if node.driver and sizes else node for node in nodes)


def _node(offer: NodeOffer, number: int) -> Node:
    name = offer.name if offer.count == 1 else f"{offer.name}-{number}"
    free = {"CPU": offer.cpus, "GPU": offer.gpus, EMULATOR: offer.emulators}
    return Node(
        name=name,
        address=offer.address or name,
        free={kind: amount for kind, amount in free.items() if amount},
        cores=offer.cores or offer.cpus,
        driver=offer.driver,
        gpu_bytes=None if offer.gpu_memory is None else offer.gpu_memory * GIB,
        host_bytes=None if offer.memory is None else offer.memory * GIB,
    )
