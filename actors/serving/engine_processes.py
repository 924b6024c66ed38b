"""The processes of an engine, which end with the actor that started them, however it ends.

vLLM's engine process does not watch its parent: when the actor is killed (out of memory, `kill -9`), it would stay and
hold its share of the GPU. What runs first in it that is not vLLM's own is the executor; so these are vLLM's executors,
which begin by asking the kernel to end the process with its parent.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from envs.parent import end_with_parent


class OneProcess(UniProcExecutor):
    """The worker runs in the engine's process."""

    def _init_executor(self) -> None:
        _end_with_parent()
        super()._init_executor()


class SeveralProcesses(MultiprocExecutor):
    """One process per worker, for tensor parallelism."""

    def _init_executor(self) -> None:
        _end_with_parent()
        super()._init_executor()
        # vLLM's workers watch a pipe from the engine's process, but one that waits in a kernel does not look at it.
        self.collective_rpc(_end_worker_with_engine)


def _end_worker_with_engine(worker: Any) -> None:
    _end_with_parent()


def _end_with_parent() -> None:
    """The kernel looks at the thread that started this process. Those of an actor's event loop stay till its end."""
    if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
        end_with_parent(parent.pid)
