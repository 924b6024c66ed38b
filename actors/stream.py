"""The bounded stream of finished episodes between rollout workers and the learner (asynchronous mode).

A full stream makes `put` wait, so a slow learner slows the rollouts and memory stays flat. Run as a Ray actor.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

import psutil

from actors.trajectory import TrajectoryBatch


class TrajectoryStream:
    """First in, first out; bounded in bytes and in steps.

    `capacity_bytes` bounds memory. `capacity_steps` bounds how far rollouts run ahead of the learner, which is what
    keeps data within the allowed policy lag. While a `take` is short of what it asked for, episodes are let in even
    past the bounds, since otherwise an ask larger than the capacity could never be met.
    """

    def __init__(self, capacity_bytes: int, capacity_steps: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._capacity_steps = capacity_steps
        self._episodes: deque[tuple[TrajectoryBatch, int]] = deque()
        self._bytes = 0
        self._steps = 0
        self._wanted = 0
        self._bytes_in = 0
        self._last_put = time.monotonic()
        self._changed = asyncio.Condition()

    async def put(self, episode: TrajectoryBatch) -> float:
        """Add one finished episode; waits while the stream is full. Returns the seconds waited."""
        size = episode.nbytes
        started = time.monotonic()
        async with self._changed:
            await self._changed.wait_for(self._has_room)
            self._episodes.append((episode, size))
            self._bytes += size
            self._bytes_in += size
            self._steps += len(episode)
            self._last_put = time.monotonic()
            self._changed.notify_all()
        return time.monotonic() - started

    async def take(self, steps: int, wait_s: float) -> TrajectoryBatch | None:
        """Whole episodes of at least `steps` steps together, oldest first; None if they did not come in `wait_s`.

        One taker at a time. Nothing is taken out when None is returned.
        """
        async with self._changed:
            self._wanted = steps
            self._changed.notify_all()
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait_for(lambda: self._steps >= steps)
            except TimeoutError:
                return None
            taken = []
            count = 0
            while count < steps:
                episode, size = self._episodes.popleft()
                taken.append(episode)
                count += len(episode)
                self._bytes -= size
                self._steps -= len(episode)
            self._wanted = 0
            self._changed.notify_all()
        return TrajectoryBatch.concatenate(taken)

    async def status(self) -> dict[str, float]:
        """Episodes, steps and bytes held, bytes ever put, seconds since an episode last came in, resident memory."""
        return {
            "episodes": len(self._episodes),
            "steps": self._steps,
            "bytes": self._bytes,
            "bytes_in": self._bytes_in,
            "idle_seconds": time.monotonic() - self._last_put,
            "rss_bytes": psutil.Process().memory_info().rss,
        }

    def _has_room(self) -> bool:
        if self._steps < self._wanted:
            return True
        return self._bytes < self._capacity_bytes and self._steps < self._capacity_steps
