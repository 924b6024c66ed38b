"""How long a rollout worker waits for policy servers: its deadline is of their silence, not of a call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.generation import GenerationRequest
from actors.rollouts.policy_client import PolicyClient
from actors.serving.admission import Silence

REQUESTS = [GenerationRequest(f"prompt {n}", "image", b"", 1.0, 8, seed=n) for n in range(8)]


class Remote:
    """A method as of an actor handle: `.remote(...)` gives an awaitable."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self.remote = method


class Server:
    """Answers one request after the other, each after `seconds`; after `answers` of them it is silent."""

    def __init__(self, seconds: float, answers: int) -> None:
        self.generate_batch, self.status = Remote(self._generate_batch), Remote(self._status)
        self._seconds, self._answers = seconds, answers
        self._requests = 0

    async def _generate_batch(self, requests: list[GenerationRequest]) -> list[str]:
        answers = []
        for request in requests:
            await asyncio.sleep(self._seconds if self._requests < self._answers else 3600)
            self._requests += 1
            answers.append(request.prompt)
        return answers

    async def _status(self) -> dict[str, Any]:
        return {"requests": self._requests}


def ask(server: Server, deadline_s: float) -> Any:
    client = PolicyClient([server], deadline_s, "rollout worker 3")
    return asyncio.run(asyncio.wait_for(client.generate_batch(0, REQUESTS), 60))


def test_a_batch_longer_than_the_deadline_is_waited_for_while_its_server_gives_answers() -> None:
    assert ask(Server(0.4, 8), deadline_s=1.6) == [request.prompt for request in REQUESTS]


def test_a_server_that_falls_silent_in_a_batch_is_given_up() -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="no policy server answered rollout worker 3 within 1 s of its last answer"):
        ask(Server(0.2, 4), deadline_s=1.0)
    assert time.monotonic() - begun > 1.0


def test_work_that_waits_for_its_turn_is_not_late_while_the_work_before_it_comes_further() -> None:
    async def main() -> None:
        silence = Silence()

        async def waiting(seconds: float) -> None:
            async with silence.bounded(0.5):
                await asyncio.sleep(seconds)

        late = asyncio.create_task(waiting(1.5))
        for _ in range(6):
            await asyncio.sleep(0.2)
            silence.broken()
        await late
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            await waiting(60)
        assert 0.4 < time.monotonic() - begun < 30

    asyncio.run(main())
