"""How a rollout worker calls the policy servers: the next server answers while one is being restarted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from actors.generation import Generation, GenerationRequest, Refusal

_RETRY_S = 0.2
#: While a call is under way, how often to ask whether its server gives answers, at most, seconds.
_PROGRESS_POLL_S = 5.0


class PolicyClient:
    """Handles of the policy servers, seen as one server that is always there.

    Every call names the server that it prefers, as a number (taken modulo the number of servers).
    """

    def __init__(self, servers: Sequence[Any], deadline_s: float, name: str) -> None:
        """deadline_s: longest wait for a call, with all its retries, while its server gives no answer to anybody. name:
        of the caller, for error messages."""
        self._servers = list(servers)
        self._deadline_s = deadline_s
        self._name = name

    async def generate(self, preferred: int, request: GenerationRequest) -> Generation | Refusal:
        """One answer. Raises TimeoutError, and what a server that is alive raised."""
        return await self._call(preferred, lambda server: server.generate.remote(request))

    async def generate_batch(self, preferred: int, requests: list[GenerationRequest]) -> list[Generation | Refusal]:
        """`PolicyServer.generate_batch`. Raises TimeoutError, and what a server that is alive raised."""
        return await self._call(preferred, lambda server: server.generate_batch.remote(requests))

    async def refusal(self, preferred: int, request: GenerationRequest) -> Refusal | None:
        """`PolicyServer.refusal`. Raises TimeoutError, and what a server that is alive raised."""
        return await self._call(preferred, lambda server: server.refusal.remote(request))

    async def _call(self, preferred: int, call: Callable[[Any], Any]) -> Any:
        """Call the servers in turn, from the preferred one on, until one answers. Ray restarts dead ones meanwhile."""
        patience = _Patience(self._deadline_s)
        attempt = 0
        while True:
            server = self._servers[(preferred + attempt) % len(self._servers)]
            try:
                return await patience.wait(call(server), server)
            except (RayActorError, TimeoutError, RayTaskError) as error:
                # A server that is alive and rejects the request would reject it again. One that was too busy to answer
                # in time may answer the next time.
                if isinstance(error, RayTaskError) and not isinstance(error, TimeoutError):
                    raise
                if patience.is_over:
                    raise TimeoutError(
                        f"no policy server answered {self._name} within {self._deadline_s:.0f} s of its last answer "
                        f"(policy_server.generate_deadline_s and start_deadline_s together); last error: {error}"
                    ) from error
                attempt += 1
                await asyncio.sleep(_RETRY_S)


class _Patience:
    """How long one call, with its retries, may still wait: each answer that a server gives meanwhile prolongs it."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._last = time.monotonic()
        self._answers: dict[Any, int] = {}  # that each server had given when it was asked

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self._last >= self._deadline_s

    async def wait(self, reference: Any, server: Any) -> Any:
        """The result of a call of this server. TimeoutError when the patience is over; and what the call raises."""
        answer = asyncio.ensure_future(reference)
        poll_s = min(_PROGRESS_POLL_S, self._deadline_s / 4)
        try:
            while True:
                done, _ = await asyncio.wait({answer}, timeout=poll_s)
                if done:
                    return answer.result()
                await self._look_at(server, poll_s)
                if self.is_over:
                    raise TimeoutError("no answer")
        finally:
            answer.cancel()

    async def _look_at(self, server: Any, limit_s: float) -> None:
        asked = time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                given = (await server.status.remote())["requests"]
        except (RayActorError, TimeoutError):
            return
        if given > self._answers.get(server, given):
            self._last = asked
        self._answers[server] = given  # fewer than before, where the server was restarted
