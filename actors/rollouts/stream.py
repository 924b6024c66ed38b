"""The bounded stream of finished episodes between rollout workers and the learner (asynchronous mode).

Environments ask before they begin an episode, and wait while those that are finished or under way are as many as the
learner can still use. So rollouts neither run out of memory nor compute what would be too old when its turn comes. Run
as a Ray actor.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from itertools import takewhile

import psutil

from actors.trajectory import TrajectoryBatch

#: Episodes whose mean length and duration say what those under way will be.
RECENT_EPISODES = 100
#: An episode that takes this many times the mean duration is not counted on any more: its environment may be stuck.
OVERDUE = 4.0
#: The same before any episode has ended, seconds.
FIRST_EPISODE_S = 30.0


class TrajectoryStream:
    """First in, first out; bounded in bytes and in steps.

    `capacity_bytes` bounds memory: episodes begin while less is held, so it is exceeded by what is then under way.
    `ahead_steps` bounds how many steps are made beyond what a `take` is asking for; see `allow`.
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
        self._begun: dict[str, float] = {}  # environments with an episode under way: since when, the oldest first
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_EPISODES)  # steps, seconds
        self._mean_steps, self._mean_seconds = 1.0, 0.0  # of these
        self._waiting: dict[str, asyncio.Future[None]] = {}  # environments that may not begin yet, the first first
        self._arrived = asyncio.Event()

    async def begin(self, environment: str) -> float:
        """Wait until this environment may begin an episode; returns the seconds waited. First come, first served."""
        started = time.monotonic()
        self._begun.pop(environment, None)
        if (forgotten := self._waiting.pop(environment, None)) is not None:
            forgotten.cancel()  # its worker died, and the one in its place asks anew
        self._waiting[environment] = leave = asyncio.get_running_loop().create_future()
        self._let_in()
        await leave
        return time.monotonic() - started

    async def put(self, environment: str, episode: TrajectoryBatch) -> float:
        """Add the episode that this environment has finished, at once, and wait as `begin` does for its next."""
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
        """From now on, let this many steps be made beyond what a `take` is asking for (below 0: so many fewer)."""
        self._ahead_steps = ahead_steps
        self._let_in()

    async def take(self, steps: int, wait_s: float) -> TrajectoryBatch | None:
        """Whole episodes of at least `steps` steps together, oldest first; None if they did not come in `wait_s`.

        One taker at a time. Nothing is taken out when None is returned.
        """
        self._wanted = steps
        self._let_in()
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
        self._let_in()
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

    def _let_in(self) -> None:
        """Let those that wait begin, one by one, while there is room. To be called after every change."""
        while self._waiting and self._has_room():
            environment, leave = next(iter(self._waiting.items()))
            del self._waiting[environment]
            if not leave.done():  # else the one who asked gave up
                self._begun[environment] = time.monotonic()
                leave.set_result(None)

    def _has_room(self) -> bool:
        expected = self._steps + self._steps_under_way()
        if expected >= self._wanted + self._ahead_steps:
            return False
        # An ask is met whatever it takes; only what goes beyond it is bounded in bytes.
        return expected < self._wanted or self._bytes < self._capacity_bytes

    def _steps_under_way(self) -> float:
        """Steps that the episodes under way will have, by the mean of recent ones."""
        overdue = OVERDUE * self._mean_seconds if self._recent else FIRST_EPISODE_S
        # Asked for every environment that is let in, so only those at the front are looked at.
        latest = time.monotonic() - overdue
        stuck = sum(1 for _ in takewhile(lambda begun: begun < latest, self._begun.values()))
        return self._mean_steps * (len(self._begun) - stuck)
