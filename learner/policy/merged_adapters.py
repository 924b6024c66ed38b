"""Adapted linear layers that multiply by the merged weight, rounded as in an engine that is sent merged weights."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from learner.policy.weight_export import merged_weight


class MergedLinear(lora.Linear):
    """y = round(W + scale · B A) x. A and B get the gradients that they would have without the rounding.

    In training mode (supervised fine-tuning, which no engine serves) it is peft's layer, with its dropout. Not under
    ZeRO-3, which brings a weight when its own layer runs.
    """

    @staticmethod
    def adopt(model: nn.Module) -> None:
        """Make the adapted layers of a peft model such layers."""
        for module in model.modules():
            if type(module) is lora.Linear:
                module.__class__ = MergedLinear

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if self.training or self.disable_adapters:
            return super().forward(x, *arguments, **named)
        (adapter,) = self.active_adapters
        base: Any = self.get_base_layer()
        low, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return _Multiply.apply(x, base.weight, base.bias, low, up, self.scaling[adapter])


class _Multiply(torch.autograd.Function):
    """The merged weight is made anew in the backward pass: kept, it would be a second copy of the model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, up: Tensor, scale: float) -> Any:
        ctx.save_for_backward(x, weight, low, up)
        ctx.scale = scale
        return nn.functional.linear(x, merged_weight(weight, low, up, scale), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, low, up = ctx.saved_tensors
        of_x = gradients[0] @ merged_weight(weight, low, up, ctx.scale)
        inputs, outputs = x.flatten(0, -2), gradients[0].flatten(0, -2)
        of_low = ctx.scale * (outputs @ up).T @ inputs
        of_up = ctx.scale * outputs.T @ (inputs @ low.T)
        return of_x, None, None, of_low, of_up, None
