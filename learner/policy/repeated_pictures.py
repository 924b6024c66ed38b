"""A vision tower that is run once per picture, however many samples of a batch show it.

Samples of a batch often show the same picture: an environment with few states, several answers to one prompt, a screen
that did not change. The tower's answer for a picture depends on that picture alone, so one answer serves all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def encode_repeats_once(base_model: Any) -> None:
    """Make the vision tower of a Hugging Face VLM leave repeated pictures out; outputs and gradients stay as they are.

    Applies where every tensor that the tower is given has one row per picture, pixels as (pictures, …, H, W), and
    dropout is off (with dropout on, each repeat draws its own). Families that flatten pictures into patches are run as
    they are.
    """
    tower = base_model.get_encoder(modality="image")
    if not isinstance(tower, nn.Module) or tower is base_model:
        return
    run = tower.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        given = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
        found = None if tower.training else _repeats(given)
        if found is None:
            return run(*arguments, **named)
        first, picture_of = found

        def without_repeats(value: Any) -> Any:
            return value[first] if isinstance(value, Tensor) else value

        output = run(*map(without_repeats, arguments), **{key: without_repeats(value) for key, value in named.items()})
        return tree_map_only(Tensor, lambda tensor: tensor[picture_of], output)

    tower.forward = forward


def _repeats(given: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """(int64 (U,), the rows that differ from all before them; int64 (B,), which of those each row equals). None where
    no row repeats, or where rows are not pictures."""
    rows = len(given[0]) if given and given[0].ndim else 0
    if (
        rows < 2
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
    same = all(torch.equal(tensor, tensor[first][picture_of]) for tensor in given)
    return (first, picture_of) if same else None
