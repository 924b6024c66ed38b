"""A small share of `benchmarks/fuzz.py`: the same mutations each time, none of which may raise what is not our own."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fuzz import LONGEST_INPUT, Target, fuzz, mutated, note_hangs
from benchmarks.fuzz_targets import NAMES, targets

#: Inputs of a target here, by what one costs.
SHARE = {"configs": 25, "overrides": 50, "tasks": 40, "trajectories": 40, "model folders": 6, "http replies": 40}


@pytest.fixture()
def alarm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM)
    note_hangs()
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_our_own_errors(name: str, tmp_path: Path, alarm: None) -> None:
    target = targets(tmp_path, {name})[name]
    result = fuzz(target, SHARE.get(name, 150), seed=0)
    assert result["exceptions_not_our_own"] == 0, result["findings"]
    assert result["refused"] < result["inputs"] or name == "http replies"


def test_the_fuzzer_finds_what_is_wrong(alarm: None) -> None:
    def read(data: bytes) -> None:
        if b"bad" in data:
            raise KeyError("bad")
        if b"own" in data:
            raise ValueError("own")
        if b"slow" in data:
            time.sleep(30)

    target = Target("sample", [b"good", b"own"], [b"bad"], read, (ValueError,), 0)
    result = fuzz(target, 200, seed=1)
    assert result["exceptions_not_our_own"] > 0 and result["refused"] > 0
    assert any(key.startswith("KeyError at test_fuzz.py") for key in result["findings"])
    assert fuzz(target, 50, seed=1)["slowest_input_bytes"] <= LONGEST_INPUT
    slow = fuzz(replace(target, corpus=[b"slow" * 40], words=[]), 1, seed=3, hang_s=0.1)
    assert slow["slowest_ms"] >= 100 and any(key.startswith("Hang") for key in slow["findings"])


def test_the_same_seed_gives_the_same_inputs() -> None:
    target = Target("sample", [b"some real input", b"another"], [b"word"], lambda data: None, (), 0)
    chances = [random.Random(5), random.Random(5)]
    one, other = ([mutated(target, chance) for _ in range(300)] for chance in chances)
    assert one == other and len(set(one)) > 200 and max(map(len, one)) <= LONGEST_INPUT
