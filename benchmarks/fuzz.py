"""Give the parsers damaged and hostile input: no exception but our own, no hang, no growth of memory.

    python -m benchmarks.fuzz --out benchmarks/results/fuzz.json            # a million inputs, about ten minutes
    python -m benchmarks.fuzz --only png --scale 0.1 --seed 7 --out …       # a tenth of one target, added to the file

Inputs are mutations of real ones (`benchmarks/fuzz_targets.py` has the targets): bytes flipped, cut out, repeated,
words of the format put in, two inputs joined. The same seed gives the same inputs. Each target runs in a process of its
own, since a damaged file may bring down the library that reads it. `slowest_ms` is wall time, which other work on the
machine adds to. `tests/test_fuzz.py` runs a small share.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import hashlib
import json
import logging
import multiprocessing
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

#: One input that takes longer is a hang, seconds.
HANG_S = 20.0
LONGEST_INPUT = 1 << 16
EXTREMES = (b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"4294967295", b"-9223372036854775808", b"0x7f")
#: Findings that are kept of a target, each with its input.
FINDINGS = 5


@dataclass(frozen=True)
class Target:
    """Something that reads input of others.

    corpus: real inputs; words: of its format; read: takes an input; own: the exceptions that it may raise; inputs: its
    share of the million.
    """

    name: str
    corpus: list[bytes]
    words: list[bytes]
    read: Callable[[bytes], object]
    own: tuple[type[Exception], ...]
    inputs: int


class Hang(BaseException):
    """An input took longer than `HANG_S`."""


def mutated(target: Target, chance: random.Random) -> bytes:
    """A mutation of one of the target's real inputs."""
    data = bytearray(chance.choice(target.corpus))
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3, 5, 12))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 2, 4, 16, 64, 512)))
        match chance.randrange(9):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end] * chance.choice((1, 2, 3, 50))
            case 3 | 4 if target.words:
                data[at:at] = chance.choice(target.words)
            case 5 if target.words:
                data[at:at] = chance.choice(target.words) * chance.choice((2, 2, 3, 10, 10, 30, 100, 3000))
            case 6:
                data[at:end] = chance.randbytes(end - at)
            case 7:
                data[at:end] = chance.choice(EXTREMES)
            case _:
                data[at:] = chance.choice(target.corpus)[at:]
    return bytes(data[:LONGEST_INPUT])


def fuzz(target: Target, inputs: int, seed: int, hang_s: float = HANG_S) -> dict[str, Any]:
    """Give a target that many inputs; returns its figures. exceptions: those that are not its own."""
    chance = random.Random(f"{target.name} {seed}")
    process = psutil.Process()
    found: dict[str, dict[str, str]] = {}
    exceptions = refused = 0
    slowest, slowest_input = 0.0, b""
    held = 0
    begun, cpu = time.perf_counter(), time.process_time()
    for number in range(inputs):
        data = mutated(target, chance)
        if number == inputs // 5:  # caches are full by now
            gc.collect()
            held = process.memory_info().rss
        started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, hang_s)
        try:
            target.read(data)
        except target.own:
            refused += 1
        except (Exception, Hang) as error:
            exceptions += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            if len(found) < FINDINGS:
                found.setdefault(key, {"message": str(error)[:200], "input": repr(data[:300])})
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.perf_counter() - started
        if seconds > slowest:
            slowest, slowest_input = seconds, data
    total = time.perf_counter() - begun
    gc.collect()
    return {
        "seeds": [seed],
        "inputs": inputs,
        "seconds": round(total, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "refused": refused,
        "exceptions_not_our_own": exceptions,
        "slowest_ms": round(1000 * slowest, 1),
        "slowest_input_bytes": len(slowest_input),
        "slowest_input_blake2": hashlib.blake2b(slowest_input, digest_size=8).hexdigest(),
        "grown_mb": round((process.memory_info().rss - held) / 1e6, 1),
        **({"findings": found} if found else {}),
    }


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The figures of two pieces of one target, with other seeds; those of the same seed are replaced."""
    if not before or set(before["seeds"]) & set(now["seeds"]):
        return now
    slower = max(before, now, key=lambda piece: piece["slowest_ms"])
    sums = ("seeds", "inputs", "seconds", "cpu_seconds", "refused", "exceptions_not_our_own")
    findings = before.get("findings", {}) | now.get("findings", {})
    return {
        **slower,
        **{key: before[key] + now[key] if key == "seeds" else round(before[key] + now[key], 1) for key in sums},
        "grown_mb": max(before["grown_mb"], now["grown_mb"]),
        **({"findings": findings} if findings else {}),
    }


def note_hangs() -> None:
    """Let an input that takes longer than `HANG_S` raise `Hang`. For the main thread."""

    def ring(number: int, frame: object) -> None:
        raise Hang(f"no end within {HANG_S:g} s")

    signal.signal(signal.SIGALRM, ring)


def _fuzz_by_name(name: str, scale: float, seed: int) -> dict[str, Any]:
    from benchmarks.fuzz_targets import targets

    faulthandler.enable()
    logging.disable(logging.ERROR)
    note_hangs()
    with tempfile.TemporaryDirectory() as folder:
        target = targets(Path(folder), {name})[name]
        return fuzz(target, max(1, round(target.inputs * scale)), seed)


def main() -> int:
    from benchmarks.fuzz_targets import NAMES
    from benchmarks.record import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], choices=NAMES, help="targets")
    parser.add_argument("--scale", type=float, default=1.0, help="share of each target's inputs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write; pieces of other seeds are added up")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in arguments.only or NAMES:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                results[name] = pool.submit(_fuzz_by_name, name, arguments.scale, arguments.seed).result()
            except BrokenProcessPool:
                raise SystemExit(
                    f"{name}, seed {arguments.seed}: an input brought down the process; see above"
                ) from None
        print(name, json.dumps(results[name], indent=1), flush=True)
    if arguments.out is not None:
        before = json.loads(arguments.out.read_text(encoding="utf-8"))["targets"] if arguments.out.exists() else {}
        pieces = before | {name: joined(before.get(name, {}), result) for name, result in results.items()}
        every = {name: pieces[name] for name in NAMES if name in pieces}
        keys = ("inputs", "exceptions_not_our_own", "seconds", "cpu_seconds")
        totals = {key: round(sum(each.get(key, 0) for each in every.values())) for key in keys}
        record(arguments.out, {**totals, "targets": every})
    return int(any(each["exceptions_not_our_own"] for each in results.values()))


if __name__ == "__main__":
    sys.exit(main())
