"""A trace: fingerprints of all that an environment returns for seeds and utterances, to compare two of them."""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.contract.player import Environment, Player

#: Field -> fingerprint, for the reset and each step.
Trace = list[dict[str, str]]
EPISODES, STEPS = 3, 12


@dataclass(frozen=True)
class Script:
    """Episodes to play: seeds, and the utterances of each."""

    seeds: list[int]
    utterances: list[list[str]]


def record(subject: Environment, first_seed: int) -> tuple[Script, Trace]:
    """Play some episodes; returns what was said and what came back."""
    script, trace = Script([], []), []
    ends = time.monotonic() + subject.play_s
    with Player(subject) as player:
        for seed in range(first_seed, first_seed + EPISODES):
            rng = np.random.default_rng(seed)
            script.seeds.append(seed)
            script.utterances.append([])
            trace.append(fingerprints(seed, 0, player.reset(seed)))
            while not player.over and len(script.utterances[-1]) < STEPS:
                utterance = player.answer(rng)
                script.utterances[-1].append(utterance)
                trace.append(_step(player, seed, len(script.utterances[-1]), utterance))
            if time.monotonic() > ends:
                break
    return script, trace


def replay(player: Player, script: Script) -> Trace:
    """Play the same script again."""
    trace = []
    for seed, utterances in zip(script.seeds, script.utterances, strict=True):
        trace.append(fingerprints(seed, 0, player.reset(seed)))
        for number, utterance in enumerate(utterances, start=1):
            if player.over:
                break
            trace.append(_step(player, seed, number, utterance))
    return trace


def difference(first: Trace, second: Trace) -> str | None:
    """The first call and field in which two traces differ, or None."""
    for one, other in zip(first, second, strict=False):
        fields = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        if fields:
            return f"{one['call']}: {', '.join(name for name in fields if name != 'call') or 'the length'} differs"
    return None if len(first) == len(second) else f"one has {len(first)} calls, the other {len(second)}"


def fingerprints(seed: int, step: int, returned: Any) -> dict[str, str]:
    """Fingerprints of (observation, info) of a reset or of all five items of a step."""
    names = (
        ("observation", "info") if len(returned) == 2 else ("observation", "reward", "terminated", "truncated", "info")
    )
    found = {"call": f"seed {seed}, {f'step {step}' if step else 'reset'}"}
    for name, value in zip(names, returned, strict=True):
        if isinstance(value, Mapping):
            found |= {f"{name}[{key!r}]": fingerprint(each) for key, each in value.items()}
        else:
            found[name] = fingerprint(value)
    return found


def fingerprint(value: Any) -> str:
    """A hash of a value's content, the same in every process."""
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    digest.update(type(value).__name__.encode())
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind != "O":
        digest.update(repr((value.dtype, value.shape)).encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _feed(digest, key)
            _feed(digest, each)
    elif isinstance(value, set | frozenset):
        digest.update("".join(sorted(map(fingerprint, value))).encode())
    elif isinstance(value, str):
        digest.update(value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for each in value:
            _feed(digest, each)
    else:
        try:
            digest.update(pickle.dumps(value))
        except Exception:
            return  # the check `pickles` names it; its type is all that can be compared


def _step(player: Player, seed: int, number: int, utterance: str) -> dict[str, str]:
    return fingerprints(seed, number, player.step(utterance).returned)
