"""Waiting for Ray calls from the controller: every wait has a deadline, and its error names what was waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from cluster.errors import DeadlineExceeded


async def answer(reference: Any, deadline_s: float, what: str) -> Any:
    """The result of one Ray call. Raises `DeadlineExceeded` naming `what`, or what the call raised."""
    return (await answers([reference], deadline_s, what))[0]


async def answers(references: Sequence[Any], deadline_s: float, what: str) -> list[Any]:
    """The results of several Ray calls, in order, all within one deadline."""

    async def one(reference: Any) -> Any:
        return await reference

    tasks = [asyncio.ensure_future(one(reference)) for reference in references]
    try:
        async with asyncio.timeout(deadline_s) as deadline:
            return await asyncio.gather(*tasks)
    except TimeoutError:
        if not deadline.expired():
            raise  # one of the calls failed with it, and says what it waited for
        late = sum(not task.done() or task.cancelled() for task in tasks)
        share = f" ({late} of {len(tasks)} did not answer)" if len(tasks) > 1 else ""
        raise DeadlineExceeded(f"{what} did not finish within {deadline_s:.0f} s{share}") from None
