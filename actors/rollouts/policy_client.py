"""How a rollout worker calls the policy servers: the next server answers while one is being restarted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from actors.generation import Generation, GenerationRequest, Refusal

_RETRY_S = 0.2


class PolicyClient:
    """Handles of the policy servers, seen as one server that is always there.

    Every call names the server that it prefers, as a number (taken modulo the number of servers).
    """

    def __init__(self, servers: Sequence[Any], deadline_s: float, name: str) -> None:
        """deadline_s: longest wait for one call, with all its retries. name: of the caller, for error messages."""
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
        deadline = time.monotonic() + self._deadline_s
        attempt = 0
        while True:
            server = self._servers[(preferred + attempt) % len(self._servers)]
            left = deadline - time.monotonic()
            try:
                # asyncio.wait_for would lose a cancellation that comes together with the answer (Python 3.11).
                async with asyncio.timeout(max(left, 0.1)):
                    return await call(server)
            except (RayActorError, TimeoutError, RayTaskError) as error:
                # A server that is alive and rejects the request would reject it again. One that was too busy to answer
                # in time may answer the next time.
                if isinstance(error, RayTaskError) and not isinstance(error, TimeoutError):
                    raise
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"no policy server answered {self._name} within {self._deadline_s:.0f} s "
                        f"(policy_server.generate_deadline_s and start_deadline_s together); last error: {error}"
                    ) from error
                attempt += 1
                await asyncio.sleep(_RETRY_S)
