"""Work that takes only cores that would be idle, until somebody waits for it."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class TwoPriorities:
    """Runs the work of a process in one of two threads, one piece at a time.

    While nobody waits, on a CPU, a piece runs in a thread under Linux's idle policy: it has 3 shares of a core, beside
    the 36 of Ray's other workers and the 1,024 of a process of normal priority. While somebody waits, the next piece
    runs in the other thread, with the process's own priority. A thread may always enter the idle policy, but to leave
    it takes CAP_SYS_NICE or RLIMIT_NICE, which is why there are two threads and none ever changes its policy.

    waited_for: whether somebody waits. May be set at any time, by any thread; pieces that start later obey it.
    """

    def __init__(self, device: str) -> None:
        self.waited_for = False
        self._raised = ThreadPoolExecutor(1, thread_name_prefix="raised", initializer=_use_one_core)
        self._idle = self._raised
        if device == "cpu":
            self._idle = ThreadPoolExecutor(1, thread_name_prefix="idle", initializer=_use_idle_cores)

    def run(self, piece: Callable[..., Result], *arguments: Any) -> Result:
        """Return what `piece(*arguments)` returns; raises what it raises."""
        return (self._raised if self.waited_for else self._idle).submit(piece, *arguments).result()


def _use_one_core() -> None:
    torch.set_num_threads(1)


def _use_idle_cores() -> None:
    _use_one_core()
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # a sandbox that forbids the call; the highest niceness has 15 shares
        os.nice(19)
