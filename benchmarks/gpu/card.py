"""What every script here shares: its arguments, the card, time and memory on it, and a table of the result."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.record import record

RESULTS = Path("benchmarks/results/gpu")


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """The command line of a script. defaults: further options of whole numbers, text or flags, by name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal (default cuda)")
    parser.add_argument("--out", type=Path, help="result file (default on cuda: benchmarks/results/gpu/SCRIPT.json)")
    for name, value in defaults.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, help=f"default {value}")
    return parser.parse_args()


def card(device: str) -> dict[str, Any]:
    """Name and memory of the device, and the versions that decide how fast it is."""
    import torch

    named: dict[str, Any] = {"torch": torch.__version__}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        named |= {"card": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        named |= {"cuda": torch.version.cuda}
    return {"device": device, **named}


def finish(script: str, settings: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print the result and write it where the command line says."""
    whole = {**in_process(card, settings.device), **result}
    out = settings.out or (RESULTS / f"{script}.json" if settings.device == "cuda" else None)
    print(json.dumps(record(out, whole) if out else whole, indent=1))


def in_process(function: Callable[..., Any], *values: Any) -> Any:
    """Call a function in a new process, which leaves the device's memory to the next one when it ends."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *values).result()


def synchronise(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def seconds(device: str, work: Callable[[], Any]) -> float:
    """Wall time of a call and of all that it gives the device to do."""
    synchronise(device)
    begun = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begun


def forget_peak(device: str) -> None:
    """Begin to look for the largest memory anew."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    """The largest memory that torch's tensors held on the card since `forget_peak`; None on a CPU."""
    if device != "cuda":
        return None
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 3)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
