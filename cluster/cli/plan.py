"""`coso plan`: what goes where, what is short, and what will limit."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.cli.arguments import Trust, Words
from cluster.config.files import config_of_words, validate
from cluster.config.paths import absolute_paths
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.model_shape import ModelShape
from cluster.launch.placement import Need, Node, Plan, needs_of, place, require_placed, storage_roots, transport_of
from cluster.launch.prediction import Change, Prediction, Rates, changes, predict
from cluster.launch.sizing import (
    Memory,
    checkpoint_bytes,
    engine_memory,
    engine_room,
    gib,
    host_memory,
    learner_memory,
    learner_room,
    shortages,
)

RESOURCES = ("CPU", "GPU", "emulator")


def plan(
    words: Words,
    address: Annotated[str | None, typer.Option(help="Plan for the Ray cluster at this address.")] = None,
    nodes: Annotated[Path | None, typer.Option(help="Plan for the nodes that this YAML file describes.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the rates of the run's stages first, in about a minute.")
    ] = False,
    rates: Annotated[
        Path | None, typer.Option(help="JSON file of rates to predict from; with --measure, they are written there.")
    ] = None,
    trust: Trust = None,
) -> None:
    """Show which actor goes to which node, what is short where, and with rates, which stage will limit.

    Without --address and --nodes it plans for `cluster.address`, or for this machine. Nothing starts, but with
    --measure. Exit code 1 if something cannot be placed.
    """
    config = absolute_paths(config_of_words(words, trust))
    if address is not None:
        config = validate({**config.model_dump(), "cluster": {**config.cluster.model_dump(), "address": address}})
    if nodes is not None and (address is not None or measure):
        raise CosoError("--nodes describes a cluster that need not exist: leave out --address and --measure")
    offered, measured = _looked_at(config, nodes, measure, rates)
    found = place(offered, needs_of(config))
    console = Console()
    console.print(nodes_table(config, found))
    for line in facts(config, found):
        console.print(line, highlight=False, soft_wrap=True)
    show_memory(console, config, found)
    require_placed(found)
    if measured is None:
        console.print("no rates, so no prediction: --measure measures them, --rates FILE takes measured ones")
        return
    prediction = predict(config, found, measured)
    console.print(limits_table(prediction))
    console.print(changes_table(prediction, changes(config, offered, measured)))


def _looked_at(
    config: RunConfig, nodes: Path | None, measure: bool, rates: Path | None
) -> tuple[tuple[Node, ...], Rates | None]:
    """The nodes and what is free on them, and the rates if there are any. Starts or joins Ray only if it has to."""
    from cluster.launch.nodes import cluster_nodes, local_node, read_nodes, with_gpu_memory

    known = None if rates is None or measure else Rates.read(rates)
    if nodes is not None:
        return read_nodes(nodes), known
    if config.cluster.address is None and not measure:
        return with_gpu_memory(local_node(config)), known
    from cluster.launch.preflight import preflight
    from cluster.launch.ray_runtime import ray_session

    if measure:
        preflight(config)
    with ray_session(config) as temporary:
        offered = with_gpu_memory(cluster_nodes(config))
        if not measure or place(offered, needs_of(config)).short:
            return offered, known
        measured = _measured(config, temporary)
    if rates is not None:
        measured.write(rates)
    return offered, measured


def _measured(config: RunConfig, temporary: Path) -> Rates:
    from cluster.run.measurement import measure_rates
    from cluster.telemetry.console import Console as RunConsole
    from cluster.training import expected_failures

    with (
        tempfile.TemporaryDirectory(prefix="coso-measure-") as folder,
        RunConsole("measuring", 0, config.logging.console) as console,
    ):
        try:
            return asyncio.run(measure_rates(config, Path(folder), temporary, console))
        except CosoError:
            raise
        except expected_failures() as error:
            reason = getattr(error, "cause", None) or error
            raise CosoError(f"measuring failed: {str(reason).strip() or type(reason).__name__}") from error


def nodes_table(config: RunConfig, found: Plan) -> Table:
    """One line per node: its actors, and of each resource what they take of what is free."""
    kinds = [kind for kind in RESOURCES if any(node.free.get(kind) for node in found.nodes) or kind == "CPU"]
    kinds += [kind for kind in RESOURCES if kind not in kinds and any(kind in need.takes for need in found.short)]
    table = Table(title=f"placement of {config.name}")
    for column in ("node", "actors", *(f"{kind} (takes / free)" for kind in kinds)):
        table.add_column(column, overflow="fold")
    for node in found.nodes:
        left = found.room(node).free
        used = [f"{node.free.get(kind, 0.0) - left.get(kind, 0.0):g} / {node.free.get(kind, 0.0):g}" for kind in kinds]
        name = node.address + (" (driver)" if node.driver else "")
        table.add_row(name, _listed(found.on(node)) or "–", *used)
    if found.short:
        lacking = [f"needs {sum(need.takes.get(kind, 0.0) for need in found.short):g}" for kind in kinds]
        table.add_row("[bold red]nowhere[/]", _listed(found.short), *lacking)
    return table


def facts(config: RunConfig, found: Plan) -> list[str]:
    """Lines on addresses and folders."""
    by_name = {node.name: node for node in found.nodes}
    lines = []
    ranks, servers = found.nodes_of("learner rank"), found.nodes_of("policy server")
    if ranks:
        lines.append(f"learner ranks connect at {found.address_for(ranks[0], ranks)}")
    if ranks and servers:
        lines.append(
            f"policy servers reach the learner at {found.address_for(ranks[0], servers)}, "
            f"weights travel by {transport_of(config, found)}"
        )
    for root in storage_roots(config, found):
        where = ", ".join(by_name[name].address for name in root.nodes)
        lines.append(f"{root.what}: {root.path} on {where}{' (shared by these nodes)' if root.shared else ''}")
    return lines


def show_memory(console: Console, config: RunConfig, found: Plan) -> None:
    """A table of what the model needs on each GPU and node, and a line for what is too much."""
    from cluster.launch.model_shape import read_shape

    try:
        shape = read_shape(Path(config.model.path))
    except CosoError as error:
        console.print(f"memory: unknown. {error}", highlight=False, soft_wrap=True)
        return
    sizes = [node.gpu_bytes for node in found.nodes if node.gpu_bytes]
    gpu_bytes, hosts = (min(sizes) if sizes else None), _host_needs(config, found, shape)
    console.print(memory_table(config, shape, gpu_bytes, hosts))
    each, kept = checkpoint_bytes(config, shape), config.training.keep_checkpoints
    console.print(
        f"disk: a checkpoint takes {gib(each)} GiB, {config.folder}/{config.name} {gib(each * (kept + 1))} GiB: {kept} "
        "are kept while one is written",
        highlight=False,
        soft_wrap=True,
    )
    short = list(shortages(config, shape, gpu_bytes)) if gpu_bytes else []
    for node, memory in hosts.items():
        if node.host_bytes and memory.total > node.host_bytes:
            short.append(f"too much for {node.address}'s own {gib(node.host_bytes)} GiB: {memory}")
    for line in short:
        console.print(f"[bold red]memory[/]: {escape(line)}", highlight=False, soft_wrap=True)


def _host_needs(config: RunConfig, found: Plan, shape: ModelShape) -> dict[Node, Memory]:
    """What the model needs of each node's own memory."""
    transport = transport_of(config, found)
    counts = {node: Counter(need.kind for need in found.on(node)) for node in found.nodes}
    return {node: host_memory(config, shape, count, transport) for node, count in counts.items()}


def memory_table(config: RunConfig, shape: ModelShape, gpu_bytes: float | None, hosts: Mapping[Node, Memory]) -> Table:
    """What the model needs of a GPU, by actor, and of each node's own memory."""
    table = Table(title=f"memory, GiB: {shape.name}, {shape.parameters / 1e9:.3g} B weights, {config.model.dtype}")
    for column in ("where", "needs", "has", "for"):
        table.add_column(column, overflow="fold")
    size, server = gpu_bytes or 0.0, config.policy_server
    on_gpus = [
        (learner_memory(config, shape), config.learner.device, learner_room(config, size)),
        (engine_memory(config, shape), server.device, engine_room(config, size)),
    ]
    for memory, device, room in on_gpus:
        if device == "cuda":
            has = gib(room) if gpu_bytes else "?"
            table.add_row(f"GPU of a {memory.actor}", gib(memory.total), has, memory.listed)
    for node, memory in hosts.items():
        if memory.total:
            has = gib(node.host_bytes) if node.host_bytes else "?"
            table.add_row(f"{node.address} itself", gib(memory.total), has, memory.listed)
    return table


def limits_table(found: Prediction) -> Table:
    """What each stage could do alone."""
    how = "stages overlap" if found.mode == "async" else "stages take turns"
    table = Table(
        title=f"predicted: {_rate(found.steps_per_s)} environment steps/s; limited by {found.limiting} ({how})"
    )
    table.add_column("stage")
    table.add_column("steps/s it could make alone", justify="right")
    for name, rate in found.limits.items():
        table.add_row(name, _rate(rate))
    return table


def changes_table(before: Prediction, larger: Iterable[Change]) -> Table:
    """What more actors would change."""
    table = Table(title="what more would change")
    table.add_column("change")
    table.add_column("steps/s", justify="right")
    table.add_column("gain", justify="right")
    table.add_column("then limited by", overflow="fold")
    for change in larger:
        if change.prediction is None:
            table.add_row(change.what, "–", "–", change.short)
        else:
            after = change.prediction
            gain = after.steps_per_s / before.steps_per_s - 1
            table.add_row(change.what, _rate(after.steps_per_s), f"{gain:+.0%}", after.limiting)
    return table


def _listed(needs: Iterable[Need]) -> str:
    """For instance `2 learner ranks, policy server`."""
    counts = Counter(need.kind for need in needs)
    return ", ".join(kind if count == 1 else f"{count} {kind}s" for kind, count in counts.items())


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
