"""The bounded stream of finished episodes between rollout workers and the learner (asynchronous mode).

An environment asks the stream before each episode. It waits while the finished and running episodes together are as
many as the learner can still use. So rollouts do not run out of memory, and do not compute episodes that would be too
old to train on. The stream runs as a Ray actor.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from itertools import takewhile

import psutil

from actors.trajectory import TrajectoryBatch

#: Recent episodes whose mean length and duration predict those of the running episodes.
RECENT_EPISODES = 100
#: An episode that takes more than this many times the mean duration no longer counts: its environment may be stuck.
OVERDUE = 4.0
#: The same before any episode has ended, seconds.
FIRST_EPISODE_S = 30.0


class TrajectoryStream:
    """First in, first out; bounded in bytes and in steps.

    `capacity_bytes` bounds memory: episodes begin while the stream holds less, so the episodes running at that moment
    may exceed it. `ahead_steps` bounds how many steps are made beyond those that `take` waits for; see `allow`.
    """

    def __init__(self, capacity_bytes: int, ahead_steps: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._ahead_steps = ahead_steps
        self._episodes: deque[tuple[TrajectoryBatch, int]] = deque()
        self._bytes = 0
        self._steps = 0
        self._wanted = 0
        self._bytes_in = 0
        self._last_put = time.monotonic()
        self._begun: dict[str, float] = {}  # environments with a running episode: its start, the oldest first
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_EPISODES)  # steps, seconds
        self._mean_steps, self._mean_seconds = 1.0, 0.0  # of these
        self._waiting: dict[str, asyncio.Future[None]] = {}  # environments that may not begin yet, first come first
        self._arrived = asyncio.Event()

    async def begin(self, environment: str) -> float:
        """Wait until this environment may begin an episode; returns the seconds waited. First come, first served."""
        started = time.monotonic()
        self._begun.pop(environment, None)
        if (abandoned := self._waiting.pop(environment, None)) is not None:
            abandoned.cancel()  # its worker died, and the restarted worker asks again
        self._waiting[environment] = permit = asyncio.get_running_loop().create_future()
        self._admit()
        await permit
        return time.monotonic() - started

    async def put(self, environment: str, episode: TrajectoryBatch) -> float:
        """Add this environment's finished episode at once, then wait until its next may begin, as `begin` does."""
        size, now = episode.nbytes, time.monotonic()
        if (begun := self._begun.pop(environment, None)) is not None:
            self._recent.append((len(episode), now - begun))
            lengths, seconds = zip(*self._recent, strict=True)
            self._mean_steps, self._mean_seconds = sum(lengths) / len(lengths), sum(seconds) / len(seconds)
        self._episodes.append((episode, size))
        self._bytes += size
        self._bytes_in += size
        self._steps += len(episode)
        self._last_put = now
        self._arrived.set()
        return await self.begin(environment)

    async def allow(self, ahead_steps: int) -> None:
        """From now on, allow this many steps beyond those that `take` waits for (below 0: so many fewer)."""
        self._ahead_steps = ahead_steps
        self._admit()

    async def take(self, steps: int, wait_s: float) -> TrajectoryBatch | None:
        """Whole episodes with at least `steps` steps together, oldest first; None if there are fewer after `wait_s`
        seconds, and then nothing is removed. One call at a time.
        """
        self._wanted = steps
        self._admit()
        try:
            async with asyncio.timeout(wait_s):
                while self._steps < steps:
                    self._arrived.clear()
                    await self._arrived.wait()
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
        self._admit()
        return TrajectoryBatch.concatenate(taken)

    async def status(self) -> dict[str, float]:
        """Episodes, steps and bytes held, bytes ever put, seconds since the last episode came, resident memory."""
        return {
            "episodes": len(self._episodes),
            "steps": self._steps,
            "bytes": self._bytes,
            "bytes_in": self._bytes_in,
            "idle_seconds": time.monotonic() - self._last_put,
            "rss_bytes": psutil.Process().memory_info().rss,
        }

    def _admit(self) -> None:
        """Let waiting environments begin, one by one, while there is room. Call it after every change."""
        while self._waiting and self._has_room():
            environment, permit = next(iter(self._waiting.items()))
            del self._waiting[environment]
            if not permit.done():  # else the caller gave up
                self._begun[environment] = time.monotonic()
                permit.set_result(None)

    def _has_room(self) -> bool:
        expected = self._steps + self._running_steps()
        if expected >= self._wanted + self._ahead_steps:
            return False
        # A waiting `take` always gets its steps; only those beyond it are bounded in bytes.
        return expected < self._wanted or self._bytes < self._capacity_bytes

    def _running_steps(self) -> float:
        """Steps that the running episodes will have, by the mean of recent ones."""
        overdue = OVERDUE * self._mean_seconds if self._recent else FIRST_EPISODE_S
        # Runs for every environment that is admitted, so look only at the oldest.
        latest = time.monotonic() - overdue
        stuck = sum(1 for _ in takewhile(lambda begun: begun < latest, self._begun.values()))
        return self._mean_steps * (len(self._begun) - stuck)
