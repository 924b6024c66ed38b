"""The bounded stream of finished episodes between rollout workers and the learner (asynchronous mode).

An environment asks the stream before each episode. It waits while the finished and running episodes together are as
many as the learner will use next. So rollouts do not run out of memory, and do not compute episodes that would be old
when they are trained on. The stream runs as a Ray actor.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import psutil

from actors.trajectory import TrajectoryBatch

#: Recent episodes whose mean length and duration predict those of the running episodes.
RECENT_EPISODES = 100
#: An episode that takes more than this many times the mean duration no longer counts: its environment may be stuck.
OVERDUE = 4.0
#: The same before any episode has ended, seconds.
FIRST_EPISODE_S = 30.0


@dataclass(frozen=True)
class _Held:
    """A finished episode; versions: int32 (steps,), of each step's oldest token."""

    episode: TrajectoryBatch
    versions: np.ndarray
    nbytes: int

    def fresh(self, oldest_version: int) -> int:
        """Number of its steps whose tokens were all sampled by `oldest_version` or later."""
        return int((self.versions >= oldest_version).sum())


class TrajectoryStream:
    """Whole episodes, the last to finish first; bounded in bytes and in steps.

    Steps are counted while they are fresh: sampled by the oldest version that the last `take` named, or later. An
    episode is dropped once none of its steps is fresh. Which episodes are taken or dropped depends only on when they
    finished. Their lengths have no influence on it, so it does not change the mean return.

    `capacity_bytes` bounds memory: episodes begin while the stream holds less, so the episodes running at that moment
    may exceed it. `ahead_steps` bounds how many steps are made beyond those that `take` waits for; see `allow`.
    """

    def __init__(self, capacity_bytes: int, ahead_steps: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._ahead_steps = ahead_steps
        self._episodes: deque[_Held] = deque()  # in the order in which they finished
        self._bytes = 0
        self._steps = 0  # that are fresh
        self._oldest_version = 0
        self._dropped_steps = 0
        self._wanted = 0
        self._bytes_in = 0
        self._last_put = time.monotonic()
        self._begun: dict[str, float] = {}  # environments with a running episode: its start, the oldest first
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_EPISODES)  # fresh steps, seconds
        self._mean_steps, self._mean_seconds = 1.0, 0.0  # of these
        self._durations = np.empty(0)  # of these: seconds, sorted
        self._steps_beyond = np.empty(0)  # mean steps of the episodes with this duration or a longer one
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
        held, now = _Held(episode, episode.behaviour_versions(), episode.nbytes), time.monotonic()
        fresh = held.fresh(self._oldest_version)
        if (begun := self._begun.pop(environment, None)) is not None:
            self._learn_lengths(fresh, now - begun)
        self._bytes_in += held.nbytes
        self._last_put = now
        if fresh:
            self._episodes.append(held)
            self._bytes += held.nbytes
            self._steps += fresh
            self._arrived.set()
        else:
            self._dropped_steps += len(episode)
        return await self.begin(environment)

    async def allow(self, ahead_steps: int) -> None:
        """From now on, allow this many steps beyond those that `take` waits for (below 0: so many fewer)."""
        self._ahead_steps = ahead_steps
        self._admit()

    async def take(self, steps: int, wait_s: float, oldest_version: int = 0) -> TrajectoryBatch | None:
        """Whole episodes with at least `steps` fresh steps together: those that finished last, in the order in which
        they finished. None if there are fewer after `wait_s` seconds, and then nothing is taken. One call at a time.

        Drops the episodes without any step of `oldest_version` or later. Versions given to later calls do not decrease.
        """
        self._oldest_version = oldest_version
        self._drop_stale()
        self._wanted = steps
        self._admit()
        try:
            async with asyncio.timeout(wait_s):
                while self._steps < steps:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return None
        taken: deque[TrajectoryBatch] = deque()
        count = 0
        while count < steps:
            held = self._episodes.pop()
            taken.appendleft(held.episode)
            count += held.fresh(oldest_version)
            self._bytes -= held.nbytes
        self._steps -= count
        self._wanted = 0
        self._admit()
        return TrajectoryBatch.concatenate(taken)

    async def status(self) -> dict[str, float]:
        """Episodes, fresh steps and bytes held; bytes ever put; steps ever dropped; seconds since the last episode
        came; resident memory. Of recent episodes: the median of their seconds, and the fresh steps per second that
        all environments make at this pace when none has to wait (0 before the first episode)."""
        seconds = float(np.median(self._durations)) if self._recent else 0.0
        environments = len(self._begun) + len(self._waiting)
        return {
            "episodes": len(self._episodes),
            "steps": self._steps,
            "bytes": self._bytes,
            "bytes_in": self._bytes_in,
            "dropped_steps": self._dropped_steps,
            "idle_seconds": time.monotonic() - self._last_put,
            "episode_seconds": seconds,
            "steps_per_s": environments * self._mean_steps / seconds if seconds else 0.0,
            "rss_bytes": psutil.Process().memory_info().rss,
        }

    def _drop_stale(self) -> None:
        """Drop the episodes without a fresh step, and count the fresh steps of the others."""
        kept: deque[_Held] = deque()
        self._steps = 0
        for held in self._episodes:
            if fresh := held.fresh(self._oldest_version):
                kept.append(held)
                self._steps += fresh
            else:
                self._dropped_steps += len(held.versions)
                self._bytes -= held.nbytes
        self._episodes = kept

    def _admit(self) -> None:
        """Let waiting environments begin, one by one, while there is room. Call it after every change."""
        expected = self._steps + self._running_steps()
        while self._waiting and self._has_room(expected):
            environment, permit = next(iter(self._waiting.items()))
            del self._waiting[environment]
            if not permit.done():  # else the caller gave up
                self._begun[environment] = time.monotonic()
                expected += self._mean_steps
                permit.set_result(None)

    def _has_room(self, expected: float) -> bool:
        if expected >= self._wanted + self._ahead_steps:
            return False
        # A waiting `take` always gets its steps; only those beyond it are bounded in bytes.
        return expected < self._wanted or self._bytes < self._capacity_bytes

    def _running_steps(self) -> float:
        """Fresh steps that the running episodes will have: of each, the mean of the recent episodes that took longer
        than it has taken so far. Short episodes end first, so those still running will be longer than most."""
        now = time.monotonic()
        if not self._recent:
            return sum(self._mean_steps for begun in self._begun.values() if now - begun <= FIRST_EPISODE_S)
        elapsed = now - np.fromiter(self._begun.values(), np.float64, len(self._begun))
        elapsed = elapsed[elapsed <= OVERDUE * self._mean_seconds]
        longer = np.minimum(np.searchsorted(self._durations, elapsed, side="right"), len(self._durations) - 1)
        return float(self._steps_beyond[longer].sum())

    def _learn_lengths(self, steps: int, seconds: float) -> None:
        """Take an episode that ended into account for predictions."""
        self._recent.append((steps, seconds))
        lengths, durations = np.array(self._recent).T
        order = np.argsort(durations)
        self._durations = durations[order]
        self._steps_beyond = np.cumsum(lengths[order][::-1])[::-1] / np.arange(len(order), 0, -1)
        self._mean_steps, self._mean_seconds = float(lengths.mean()), float(durations.mean())
