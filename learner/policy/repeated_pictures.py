"""A vision tower that is run once per picture, however many samples of a batch show it.

Samples of a batch often show the same picture: an environment with few states, several answers to one prompt, a screen
that did not change. The tower's answer for a picture depends on that picture alone, so one answer serves all of them.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


def encode_repeats_once(base_model: Any) -> None:
    """Make the vision tower of a Hugging Face VLM leave repeated pictures out; outputs and gradients stay as they are.

    Applies where every tensor that goes into the tower or comes out of it has one row per picture, pixels as
    (pictures, …, H, W), and dropout is off (with dropout on, each repeat draws its own). A family that flattens
    pictures into patches is run as it is.
    """
    tower = base_model.get_encoder(modality="image")
    if isinstance(tower, nn.Module) and tower is not base_model:
        tower.forward = MethodType(_forward, tower)


def _forward(tower: nn.Module, *arguments: Any, **named: Any) -> Any:
    given = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
    repeats = None if tower.training else _repeats(given)
    if repeats is not None:
        first, picture_of = repeats
        chosen, chosen_named = tree_map_only(Tensor, lambda tensor: tensor[first], (arguments, named))
        output = type(tower).forward(tower, *chosen, **chosen_named)
        if all(leaf.shape[:1] == first.shape for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            return tree_map_only(Tensor, lambda tensor: tensor[picture_of], output)
        del tower.forward  # its outputs have another layout, and always will
    return type(tower).forward(tower, *arguments, **named)


def _repeats(given: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """(int64 (U,), rows to run, U ≥ 2; int64 (B,), which of those each row equals). None where no row can be left out,
    or where rows are not pictures."""
    rows = len(given[0]) if given and given[0].ndim else 0
    if (
        rows < 3
        or not any(tensor.ndim >= 4 for tensor in given)
        or any(tensor.shape[:1] != (rows,) for tensor in given)
    ):
        return None
    # Equal rows have equal sums under fixed random weights; whether rows with equal sums are equal is looked at below.
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(rows, device=given[0].device)
    for tensor in given:
        flat = tensor.detach().reshape(rows, -1).float()
        sums += (flat * torch.rand(flat.shape[1], generator=generator).to(flat.device)).sum(1)
    distinct, picture_of = sums.unique(return_inverse=True)
    if len(distinct) == rows:
        return None
    numbers = torch.arange(rows, device=sums.device)
    first = numbers.new_full((len(distinct),), rows).scatter_reduce(0, picture_of, numbers, "amin")
    if len(first) == 1:
        first = numbers[:2]  # with two rows, an output that does not have one row per picture can be told apart
    same = all(torch.equal(tensor, tensor[first][picture_of]) for tensor in given)
    return (first, picture_of) if same else None
