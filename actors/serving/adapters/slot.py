"""The engine's one adapter inside a vLLM worker: made empty at the start, replaced in place by each update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from actors.serving.adapters.served import ADAPTER_ID, lora_request


class AdapterSlot:
    """One adapter of the worker's model, in float32 or the model's own dtype."""

    def __init__(self, model: Any, worker_manager: Any, rank: int, alpha: float) -> None:
        """Start with B = 0, which is the model without an adapter. worker_manager: vLLM's, of the worker."""
        self._model = model
        self._manager = model.lora_manager
        self._config = PEFTHelper(r=rank, lora_alpha=alpha, target_modules=[])  # type: ignore[arg-type]  # any number
        worker_manager.add_dummy_lora(lora_request(), rank)
        self._manager.activate_adapter(ADAPTER_ID)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the adapter. tensors: A and B as the learner names them. Raises `ValueError` for layers that vLLM
        does not adapt."""
        mapper = getattr(self._model, "hf_to_vllm_mapper", None)
        adapter = LoRAModel.from_lora_tensors(
            ADAPTER_ID,
            dict(tensors),
            self._config,
            device="cpu",
            dtype=self._manager.lora_config.lora_dtype,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )
        places = self._places()
        if unknown := sorted(name for name in adapter.loras if name not in places):
            raise ValueError(
                f"vLLM does not adapt {len(unknown)} of the {len(adapter.loras)} layers that learner.lora adapts "
                f"({', '.join(unknown[:3])}{', …' * (len(unknown) > 3)}). Set learner.lora.serving merged, or "
                "learner.lora.target language_model if it is all-linear"
            )
        self._wanted = {
            name: (lora.lora_a.clone(), (lora.lora_b.float() * lora.scaling).to(lora.lora_b.dtype))
            for name, lora in adapter.loras.items()
        }
        self._manager.remove_adapter(ADAPTER_ID)
        self._manager.add_adapter(adapter)
        self._manager.activate_adapter(ADAPTER_ID)

    def compare(self) -> tuple[int, list[str]]:
        """(tensors that the engine's layers hold as the last update gave them, layers that hold others). Shares of a
        tensor among several GPUs are not compared."""
        held, wrong = 0, []
        slot = self._manager.lora_index_to_id.index(ADAPTER_ID)
        places = self._places()
        for name, wanted in self._wanted.items():
            layer, piece = places[name]
            if layer.tp_size > 1:
                continue
            parts = (layer.lora_a_stacked[piece], layer.lora_b_stacked[piece])
            if all(_holds(part[slot, 0], tensor) for part, tensor in zip(parts, wanted, strict=True)):
                held += 2
            else:
                wrong.append(name)
        return held, wrong

    def _places(self) -> dict[str, tuple[Any, int]]:
        """Name of a layer -> (vLLM's layer that it is in, which piece of it)."""
        packed: Mapping[str, Sequence[str]] = self._manager.packed_modules
        return {
            name: (layer, piece)
            for module, layer in self._manager.modules.items()
            for piece, name in enumerate(packed.get(module, [module]))
        }


def _holds(room: Tensor, tensor: Tensor) -> bool:
    """Whether the room holds the tensor and zeros around it."""
    rows, columns = tensor.shape
    inside = torch.equal(room[:rows, :columns], tensor.to(room.device))
    return inside and not bool(room[rows:].any()) and not bool(room[:, columns:].any())
