"""How DeepSpeed's state files are read and written: nothing in them is run, and a full disk stops all ranks."""

from __future__ import annotations

from typing import Any


def restricted_checkpoint_engine() -> Any:
    """DeepSpeed's reader and writer of state files, with two differences: files are read by PyTorch's restricted
    unpickler, which builds tensors and plain data only; and a failed write is kept until all ranks are past
    DeepSpeed's barriers, where a rank that had raised would leave the others waiting."""
    import torch
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class RestrictedCheckpointEngine(CheckpointEngine):
        def __init__(self) -> None:
            super().__init__()
            self._failure: OSError | None = None

        def create(self, info: Any) -> None:
            self._failure = None

        def save(self, state_dict: dict[str, Any], path: str) -> None:
            try:
                # A file object: given a name, PyTorch's writer turns a full disk into a RuntimeError without a cause.
                with open(path, "wb") as file:
                    torch.save(state_dict, file)
            except OSError as error:
                self._failure = error

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
                return torch.load(path, map_location=map_location, weights_only=True)

        def commit(self, info: Any) -> bool:
            return self._failure is None

        def raise_failure(self) -> None:
            if self._failure is not None:
                raise self._failure

    return RestrictedCheckpointEngine()
