"""vLLM's adapters on a CPU, for an engine that has one adapter.

vLLM's own code for CPUs copies A and B once for every token of a batch: at 4,096 tokens, rank 128 and a width of 9,000
that is 19 GB for one layer. Here each is multiplied by all tokens at once.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class OneAdapterCPU(PunicaWrapperCPU):
    """Applies the adapter of slot 0; rows without an adapter stay as they are."""

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """y (n, out) += B A x of each slice, x (n, in). The steps and their rounding are those of peft's layer."""
        if self.no_lora:
            return
        slots = self.token_lora_indices[: len(x)]
        rows = slice(None) if bool((slots == 0).all()) else (slots == 0).nonzero()[:, 0]
        inputs, start = x[rows], 0
        for low, up, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            hidden = torch.nn.functional.linear(inputs, low[0, 0]) * scale
            y[rows, start : start + size] += torch.nn.functional.linear(hidden, up[0, 0])
            start += size

    def add_lora_logits(self, *arguments: Any, **named: Any) -> None:
        """The output head has no adapter, though vLLM makes room for one."""

    def add_lora_embedding(self, *arguments: Any, **named: Any) -> None:
        """Nor has the embedding."""
