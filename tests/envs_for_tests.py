"""Environments that misbehave when asked to: for tests of what happens around a failing environment.

Make them with `tests.envs_for_tests:coso-test/Troubled-v0` (or Odd), which imports this module wherever it is made.
"""

import os
import signal
import sys
import threading
import time
from typing import Any

import gymnasium
import numpy as np

from envs.cards.number_line import NumberLine

TROUBLED_ID = "coso-test/Troubled-v0"
TROUBLED = f"{__name__}:{TROUBLED_ID}"
ODD_ID = "coso-test/Odd-v0"
ODD = f"{__name__}:{ODD_ID}"
WIDE_ID = "coso-test/Wide-v0"
WIDE = f"{__name__}:{WIDE_ID}"
MISSING = "missing"


class Troubled(NumberLine):
    """NumberLine, but an utterance that begins with `please` and one of its faults (`_trouble`) has that fault.

    `start`: "well", "raise", "exit" or "hang", what making it does; `close_hangs`: closing never ends; `marks`: a
    folder in which an empty file `closed` tells that `close` was called.
    """

    def __init__(self, start: str = "well", close_hangs: bool = False, marks: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._close_hangs = close_hangs
        self._marks = marks
        if start == "raise":
            raise OSError("no emulator image")
        if start == "exit":
            sys.exit("no licence")
        if start == "hang":
            time.sleep(3600)

    def step(self, action: str) -> Any:
        _trouble(action)
        observation, reward, terminated, truncated, info = super().step(action)
        if action == "please send a lock":
            info["lock"] = threading.Lock()
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        if self._marks:
            with open(os.path.join(self._marks, "closed"), "w"):
                pass
        if self._close_hangs:
            time.sleep(3600)


class Speechless(Exception):
    """An exception that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def _trouble(action: str) -> None:
    match action:
        case "please hang":
            # As a driver stuck in a system call does, it ignores polite signals.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        case "please die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "please leave":
            os._exit(0)
        case "please raise":
            raise RuntimeError("the emulator lost its screen")
        case "please exit":
            sys.exit("no licence found")
        case "please interrupt":
            raise KeyboardInterrupt
        case "please raise without words":
            raise Speechless
        case "please raise half a character":
            raise RuntimeError("typed \ud83d" + "!" * 10**6)
        case "please close files":
            os.closerange(0, 256)
        case "please print":
            print("row\n" * 10_000)
            os.close(1)
        case "please work in threads":
            threading.Thread(target=time.sleep, args=(3600,)).start()


class Odd(NumberLine):
    """NumberLine, but from step `after` on (0: from the reset on) some of what it returns is replaced.

    changes: by field ("image", "prompt", "reward", "terminated", "truncated", "info" and the names of its entries), the
    value that replaces it; `MISSING` leaves out an entry of the observation or the info.
    """

    def __init__(self, changes: dict[str, Any], after: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._changes = changes
        self._left = after

    def reset(self, **arguments: Any) -> Any:
        observation, info = super().reset(**arguments)
        return (self._changed(observation), info) if self._left <= 0 else (observation, info)

    def step(self, action: str) -> Any:
        outcome = super().step(action)
        self._left -= 1
        if self._left > 0:
            return outcome
        observation, reward, terminated, truncated, info = outcome
        fields = {"reward": reward, "terminated": terminated, "truncated": truncated, "info": self._changed(info)}
        fields |= {name: self._changes[name] for name in fields if name in self._changes}
        return self._changed(observation), *fields.values()

    def _changed(self, entries: dict[str, Any]) -> dict[str, Any]:
        changed = {name: self._changes.get(name, value) for name, value in entries.items()}
        return {name: value for name, value in changed.items() if not isinstance(value, str) or value != MISSING}


class Wide(gymnasium.Wrapper):
    """NumberLine, cut off after three steps; the picture after the last one is 300 times as wide as it is high."""

    def __init__(self) -> None:
        super().__init__(NumberLine(max_position=50))
        self._steps = 0

    def reset(self, **arguments: Any) -> Any:
        self._steps = 0
        return super().reset(**arguments)

    def step(self, action: str) -> Any:
        observation, reward, terminated, _, info = super().step(action)
        self._steps += 1
        truncated = self._steps == 3 and not terminated
        if truncated:
            observation = {**observation, "image": np.zeros((10, 3000, 3), np.uint8)}
        return observation, reward, terminated, truncated, info


if TROUBLED_ID not in gymnasium.registry:
    gymnasium.register(TROUBLED_ID, entry_point=Troubled)
    gymnasium.register(ODD_ID, entry_point=Odd)
    gymnasium.register(WIDE_ID, entry_point=Wide)
