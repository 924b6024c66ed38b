"""An update into a paused engine, and the check that it took: all weights, or the adapter beside them.

Both functions return `LoadReport.checksums` and `LoadReport.held`. info: the fields of
`actors.serving.weight_backends.UpdateInfo`; server: for error messages; part: called with the name of each part that is
done. They raise `WeightTransferError` where the engine was given or holds something else, and what the engine raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from actors.serving.weight_transfer import WeightUpdate, check_held, check_received

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


async def load_weights(
    engine: AsyncLLM, update: WeightUpdate, info: dict[str, Any], server: str, part: Callable[[str], None]
) -> tuple[dict[str, int] | None, int | None]:
    """Replace all weights."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    await engine.start_weight_update()
    part("prepare")
    await engine.update_weights(WeightTransferUpdateRequest(update_info=info))
    part("load")
    await engine.finish_weight_update(str(update.version))
    part("process")
    checksums: list[Any] = await engine.collective_rpc("received_checksums")
    for received in checksums:  # of each worker
        check_received(update, received, server)
    held = [each for each in await engine.collective_rpc("compare_held_weights") if each]
    check_held(update, [piece for _, wrong in held for piece in wrong], server)
    return checksums[0], min((equal for equal, _ in held), default=None)


async def load_adapter(
    engine: AsyncLLM, update: WeightUpdate, info: dict[str, Any], server: str, part: Callable[[str], None]
) -> tuple[dict[str, int] | None, int | None]:
    """Replace the adapter; the model's own weights stay as they are."""
    answers: list[Any] = await engine.collective_rpc("load_adapter", args=(info,))
    await engine.update_weight_version(str(update.version))
    part("load")
    for received, _, wrong in answers:  # of each worker
        check_received(update, received, server)
        check_held(update, wrong, server)
    return answers[0][0], min(held for _, held, _ in answers) or None
