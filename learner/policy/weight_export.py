"""A model's weights as a checkpoint on disk names them, one at a time, with adapters merged; or its adapters alone.

Transformers renames and re-packs weights between a checkpoint and its modules. An engine that loads or reloads weights
knows the checkpoint's names; so does this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Given parameters, a context in which they are whole (ZeRO-3: gathered); a null context everywhere else.
Materialize = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class _Weight:
    """One tensor of the model's state and the adapter layer around it, if any."""

    tensor: Tensor
    adapted: Any | None  # a peft LoraLayer

    def parameters(self) -> list[nn.Parameter]:
        own = [self.tensor] if isinstance(self.tensor, nn.Parameter) else []
        return own + ([] if self.adapted is None else list(_low_rank_parameters(self.adapted)))

    def merged(self) -> Tensor:
        """A new tensor, detached: the weight plus scale · B A, summed in float32."""
        if self.adapted is None:
            return self.tensor.detach().clone()
        (adapter,) = self.adapted.active_adapters
        low, up = _low_rank_parameters(self.adapted)
        return merged_weight(self.tensor.detach(), low, up, self.adapted.scaling[adapter])


def merged_weight(weight: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    """weight (out, in) + scale · up (out, r) @ low (r, in), summed in float32 and rounded to the weight's dtype."""
    return (weight.float() + scale * (up.float() @ low.float())).to(weight.dtype)


class UnservableAdapter(ValueError):
    """An adapter on a layer that no checkpoint holds as a tensor of its own."""


@torch.no_grad()
def checkpoint_weights(model: Any, materialize: Materialize) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, new detached tensor) of everything that `model.save_pretrained` would write.

    model: a `PreTrainedModel`, possibly with peft layers inside. Tied weights come once, under the name that
    `save_pretrained` keeps. Only what one name (or, where a family re-packs weights, one layer) needs is materialised
    at a time. Every rank of a ZeRO-3 group must exhaust the iterator.
    """
    from transformers.core_model_loading import revert_weight_conversion

    weights = _module_weights(model)
    renamed, repacked = _names_on_disk(model, weights)
    for name, disk_name in renamed.items():
        with materialize(weights[name].parameters()):
            tensor = weights[name].merged()
        yield disk_name, tensor
    for group in repacked:
        with materialize([parameter for name in group for parameter in weights[name].parameters()]):
            tensors = {name: weights[name].merged() for name in group}
        yield from revert_weight_conversion(model, tensors).items()


@torch.no_grad()
def adapter_weights(model: Any, materialize: Materialize) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name of the adapted layer + ".lora_A.weight" or ".lora_B.weight", new detached tensor): A (r, in)
    and B (out, r), unscaled, in the dtype and with the values that the forward pass has.

    Every rank of a ZeRO-3 group must exhaust the iterator. Raises `UnservableAdapter`.
    """
    adapted = {
        name.removesuffix(".weight"): weight.adapted
        for name, weight in _module_weights(model).items()
        if weight.adapted is not None
    }
    for name, disk_name in layers_on_disk(model, list(adapted)).items():
        for leaf, part in zip(("lora_A", "lora_B"), _low_rank_parameters(adapted[name]), strict=True):
            with materialize([part]):
                tensor = part.detach().clone()
            yield f"{disk_name}.{leaf}.weight", tensor


def layers_on_disk(model: Any, layers: Sequence[str]) -> dict[str, str]:
    """Name of each linear layer -> what a checkpoint calls it. Raises `UnservableAdapter` where a checkpoint joins one
    with others; the model may be on the meta device."""
    renamed, _ = _names_on_disk(model, _module_weights(model))
    if joined := [name for name in layers if f"{name}.weight" not in renamed]:
        raise UnservableAdapter(
            f"{len(joined)} of the {len(layers)} layers that learner.lora adapts are joined with others in a "
            f"checkpoint of {type(model).__name__} (for instance {joined[0]}), so vLLM cannot be given their adapters. "
            "Set learner.lora.serving merged"
        )
    return {name: renamed[f"{name}.weight"].removesuffix(".weight") for name in layers}


def _module_weights(model: Any) -> dict[str, _Weight]:
    """Persistent parameters and buffers by the names they have without peft; tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    left_out = tied | set(model._keys_to_ignore_on_save or ())
    modules = dict(model.named_modules())
    weights: dict[str, _Weight] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if plain in left_out:
            continue
        owner, _, leaf = name.rpartition(".")
        adapted = modules[owner.removesuffix(".base_layer")] if plain != name and leaf == "weight" else None
        weights[plain] = _Weight(tensor, adapted)
    return weights


def _names_on_disk(model: Any, weights: dict[str, _Weight]) -> tuple[dict[str, str], list[list[str]]]:
    """(module name -> checkpoint name where it is the same tensor, groups of module names that are re-packed).

    Found by letting transformers convert stand-ins without data: a tensor that comes out as itself was only renamed.
    Re-packing never crosses a layer, so the weights of a layer that are re-packed form one group.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stand_ins = {
        name: torch.empty(getattr(weight.tensor, "ds_shape", weight.tensor.shape), device="meta")
        for name, weight in weights.items()
    }
    name_of = {id(tensor): name for name, tensor in stand_ins.items()}
    converted = revert_weight_conversion(model, dict(stand_ins))
    renamed = {name_of[id(tensor)]: disk_name for disk_name, tensor in converted.items() if id(tensor) in name_of}
    groups: dict[str, list[str]] = {}
    for name in weights:
        if name not in renamed:
            layer = re.match(r".*?\.\d+(?=\.)", name)
            groups.setdefault(layer.group() if layer else "", []).append(name)
    return renamed, list(groups.values())


def _low_rank_parameters(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, in) and B (out, r) of a layer that has one adapter."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight
