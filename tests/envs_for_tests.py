"""An environment that misbehaves when asked to: for tests of what happens around a failing environment.

Make it with `tests.envs_for_tests:coso-test/Troubled-v0`, which imports this module wherever it is made.
"""

import os
import signal
import threading
import time
from typing import Any

import gymnasium

from envs.cards.number_line import NumberLine

TROUBLED_ID = "coso-test/Troubled-v0"
TROUBLED = f"{__name__}:{TROUBLED_ID}"


class Troubled(NumberLine):
    """NumberLine, but an utterance with `please hang`, `please die`, `please raise` or `please send a lock` does so.

    `start`: "well", "raise" or "hang", what making it does; `close_hangs`: closing never ends; `marks`: a folder
    in which an empty file `closed` tells that `close` was called.
    """

    def __init__(self, start: str = "well", close_hangs: bool = False, marks: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._close_hangs = close_hangs
        self._marks = marks
        if start == "raise":
            raise OSError("no emulator image")
        if start == "hang":
            time.sleep(3600)

    def step(self, action: str) -> Any:
        if "please hang" in action:
            # As a driver stuck in a system call does, it ignores polite signals.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        if "please die" in action:
            os.kill(os.getpid(), signal.SIGKILL)
        if "please raise" in action:
            raise RuntimeError("the emulator lost its screen")
        observation, reward, terminated, truncated, info = super().step(action)
        if "please send a lock" in action:
            info["lock"] = threading.Lock()
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        if self._marks:
            with open(os.path.join(self._marks, "closed"), "w"):
                pass
        if self._close_hangs:
            time.sleep(3600)


if TROUBLED_ID not in gymnasium.registry:
    gymnasium.register(TROUBLED_ID, entry_point=Troubled)
