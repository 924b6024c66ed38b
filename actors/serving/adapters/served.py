"""Low-rank adapters as a policy server's engine is told of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

#: Ranks that vLLM makes room for; an adapter may have a smaller one.
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: The one adapter of an engine, which every request names. What it holds is replaced in place.
ADAPTER_NAME, ADAPTER_ID = "policy", 1


@dataclass(frozen=True, kw_only=True)
class ServedAdapters:
    """The adapters that the engine applies beside the model's own weights: W x + alpha / rank · B A x."""

    rank: int
    alpha: float
    layers: tuple[str, ...]  # last parts of the adapted layers' names: "q_proj"
    beyond_language_model: bool  # whether layers of the vision tower or the connector are among them

    def engine_arguments(self, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
        """Arguments of vLLM's `AsyncEngineArgs`."""
        return {
            "enable_lora": True,
            "max_lora_rank": min(rank for rank in ENGINE_RANKS if rank >= self.rank),
            # Every request names the adapter, so one slot is enough. vLLM's own CPU code gives rows without an adapter
            # the one of the last slot, so that slot stays empty there.
            "max_loras": 2 if device == "cpu" else 1,
            # Without a list, vLLM also makes room for adapters of the embedding and the output head. With one, it takes
            # whatever has such a name in the vision tower for a layer, a convolution too, and refuses that.
            "lora_target_modules": None if self.beyond_language_model else list(self.layers),
            "enable_tower_connector_lora": self.beyond_language_model,
        }


def lora_request() -> Any:
    """vLLM's request for the adapter, which is in the workers already. The path is never read."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(ADAPTER_NAME, ADAPTER_ID, lora_path=ADAPTER_NAME)
