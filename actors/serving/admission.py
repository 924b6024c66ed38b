"""Admission of requests to an engine, its sleep, how long it may be silent, and the time that it was busy."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any


class Gate:
    """A lock that many holders may share, or that one may hold alone."""

    def __init__(self) -> None:
        self.inside = 0
        self._alone = False
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._alone)
            self.inside += 1
        try:
            yield
        finally:
            async with self._changed:
                self.inside -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._alone)
            self._alone = True  # from here on, nobody else enters
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self.inside == 0)
                self.inside = 1
            try:
                yield
            finally:
                self.inside = 0
        finally:
            async with self._changed:
                self._alone = False
                self._changed.notify_all()


class Sleep:
    """The sleep of an engine, which gives the GPU's memory back for so long. Nobody is inside the gate meanwhile."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._engine: Any = None  # the one that sleeps
        self._alone = AsyncExitStack()

    async def begin(self, engine: Any) -> None:
        """Wait until nobody is inside, then let the engine sleep. It keeps its weights in host memory."""
        if self._engine is None:
            await self._alone.enter_async_context(self._gate.alone())
            await engine.sleep(level=1, mode="wait")
            self._engine = engine

    async def end(self) -> None:
        """Wake the engine and let those in who wait; nothing if it is awake."""
        if self._engine is not None:
            await self._engine.wake_up()
            self._engine = None
            await self._alone.aclose()


class Silence:
    """Bounds work by the time since any of it came further, not by the time since it began: work that waits for its
    turn is not late while what runs before it comes to its end."""

    def __init__(self) -> None:
        self._last = -math.inf

    def broken(self) -> None:
        """Some of the work came further just now."""
        self._last = asyncio.get_running_loop().time()

    @asynccontextmanager
    async def bounded(self, deadline_s: float) -> AsyncIterator[None]:
        """Raise TimeoutError in the block after `deadline_s` of silence since it began."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer
            due = max(begun, self._last) + deadline_s
            if due <= loop.time():
                timeout.reschedule(loop.time())
            else:
                timer = loop.call_at(due, look)

        timer = loop.call_at(begun + deadline_s, look)
        try:
            async with asyncio.timeout(None) as timeout:
                yield
        finally:
            timer.cancel()


class BusyMeter:
    """Counts the seconds during which at least one request was running."""

    def __init__(self) -> None:
        self._running = 0
        self._since = 0.0
        self._total = 0.0

    @property
    def seconds(self) -> float:
        return self._total + (time.monotonic() - self._since if self._running else 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._running == 0:
            self._since = time.monotonic()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._total += time.monotonic() - self._since
