"""Wait for Ray calls: every wait has a deadline, and its error names what was waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from cluster.errors import DeadlineExceeded

#: Time between two calls to an actor that Ray is restarting, seconds.
RESTART_POLL_S = 0.5


async def answer(reference: Any, deadline_s: float, what: str) -> Any:
    """The result of one Ray call. Raises `DeadlineExceeded` that names `what`, or the call's own error."""
    return (await answers([reference], deadline_s, what))[0]


async def answer_of_restarted(call: Callable[[], Any], deadline_s: float, what: str) -> Any:
    """Like `answer`, for an actor that Ray restarts: if it dies, call its next process, within the same deadline."""
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            return await answer(call(), max(0.1, deadline - time.monotonic()), what)
        except RayActorError as error:
            # An error that is also a RayTaskError comes from a live actor that failed because another one died.
            if isinstance(error, RayTaskError) or time.monotonic() >= deadline:
                raise
            await asyncio.sleep(RESTART_POLL_S)


async def answers(references: Sequence[Any], deadline_s: float, what: str) -> list[Any]:
    """The results of several Ray calls, in order, within one deadline. Raises as `answer`."""

    async def one(reference: Any) -> Any:
        return await reference

    tasks = [asyncio.ensure_future(one(reference)) for reference in references]
    try:
        async with asyncio.timeout(deadline_s) as deadline:
            return await asyncio.gather(*tasks)
    except TimeoutError:
        if not deadline.expired():
            raise  # the call's own TimeoutError, which says what it waited for
        late = sum(not task.done() or task.cancelled() for task in tasks)
        share = f" ({late} of {len(tasks)} did not answer)" if len(tasks) > 1 else ""
        raise DeadlineExceeded(f"{what} did not finish within {deadline_s:.0f} s{share}") from None
