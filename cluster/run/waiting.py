"""Wait for Ray calls: every wait has a deadline, and its error names what was waited for.

One short operation is bounded as a whole (`answer`). Work of any length is bounded in silence (`while_progressing`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError

from cluster.errors import DeadlineExceeded

Result = TypeVar("Result")

#: Time between two looks at the progress of long work, seconds.
PROGRESS_POLL_S = 1.0
#: Time between two calls to an actor that Ray is restarting, seconds.
RESTART_POLL_S = 0.5


async def answer(reference: Any, deadline_s: float, what: str) -> Any:
    """The result of one Ray call. Raises `DeadlineExceeded` that names `what`, or the call's own error."""
    return (await answers([reference], deadline_s, what))[0]


async def answer_of_restarted(call: Callable[[], Any], deadline_s: float, what: str) -> Any:
    """Like `answer`, for an actor that Ray restarts: if it dies, call its next process, within the same deadline."""
    deadline = time.monotonic() + deadline_s
    died: RayActorError | None = None
    while True:
        try:
            return await answer(call(), max(0.1, deadline - time.monotonic()), what)
        except DeadlineExceeded:
            if died is not None:
                raise died from None  # the reason why there was no answer in time
            raise
        except RayActorError as error:
            died = error
            # An error that is also a RayTaskError comes from a live actor that failed because another one died.
            if isinstance(error, RayTaskError) or time.monotonic() >= deadline:
                raise
            await asyncio.sleep(RESTART_POLL_S)


async def answers(references: Sequence[Any], deadline_s: float, what: str) -> list[Any]:
    """The results of several Ray calls, in order. The deadline is of silence: each answer starts it again. Raises as
    `answer`."""
    loop = asyncio.get_running_loop()

    async def one(reference: Any) -> Any:
        result = await reference
        deadline.reschedule(loop.time() + deadline_s)
        return result

    try:
        async with asyncio.timeout(deadline_s) as deadline:
            tasks = [asyncio.ensure_future(one(reference)) for reference in references]
            return await asyncio.gather(*tasks)
    except TimeoutError:
        if not deadline.expired():
            raise  # the call's own TimeoutError, which says what it waited for
        late = sum(not task.done() or task.cancelled() for task in tasks)
        share = f" ({late} of {len(tasks)} did not answer)" if len(tasks) > 1 else ""
        since = " of the last answer" if late < len(tasks) else ""
        raise DeadlineExceeded(f"{what} did not finish within {deadline_s:.0f} s{since}{share}") from None


async def while_progressing(
    work: Coroutine[Any, Any, Result], progress: Callable[[], Awaitable[Any]], silence_s: float, what: str
) -> Result:
    """The result of `work`, however long it takes. Raises `DeadlineExceeded` that names `what` once `progress()` has
    returned the same value for `silence_s` seconds; and what `work` or `progress` raise."""
    task = asyncio.create_task(work)
    started = last = time.monotonic()
    seen = None
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=min(PROGRESS_POLL_S, silence_s / 4))
            if done:
                return task.result()
            asked = time.monotonic()
            now = await progress()
            if now != seen:
                last, seen = (started if seen is None else asked), now
            elif asked - last > silence_s:
                raise DeadlineExceeded(
                    f"{what}: no progress for {asked - last:.1f} s, {asked - started:.1f} s after the call"
                )
    finally:
        task.cancel()
