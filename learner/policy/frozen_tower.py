"""A vision tower that is not trained is run once per picture, not in every pass: what it made of a picture is kept.

An update shows the model each picture several times: before the first step, and once in every epoch. With adapters on
the language model alone the tower's weights never change, and neither does its answer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from actors.images import RecentImages

#: Whole numbers of the same size as a number of so many bytes.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_features(base_model: Any, capacity_bytes: int) -> None:
    """Make the vision tower of a Hugging Face VLM answer from memory for pictures that it has seen.

    Applies where no parameter of the tower is trained, dropout is off, and its inputs are one row per picture (or
    tile), pixels as (pictures, …, H, W), or the patches of all pictures with `grid_thw` int64 (pictures, 3). A pass of
    the tower may then be left out on one rank alone, which ZeRO-3 does not allow.

    capacity_bytes: of the host's memory, for features; what was used least recently goes first. 0: nothing is kept.
    """
    tower = base_model.get_encoder(modality="image")
    if not isinstance(tower, nn.Module) or tower is base_model or not capacity_bytes:
        return
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.forward = _KeptFeatures(tower, capacity_bytes)


class _KeptFeatures:
    """The `forward` of one tower."""

    def __init__(self, tower: nn.Module, capacity_bytes: int) -> None:
        self._tower = tower
        self._whole = tower.forward
        self._kept: RecentImages[list[Tensor]] = RecentImages(capacity_bytes)
        self._structures: dict[tuple[str, ...], TreeSpec] = {}  # of the outputs, by the inputs that are no tensors
        self._layout_seen = False  # that the outputs for several pictures are those for each, one after the other

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        flat, structure = tree_flatten((arguments, named))
        given = [value for value in flat if isinstance(value, Tensor)]
        sizes = None if self._tower.training else _picture_rows(given, named.get("grid_thw"))
        if sizes is None:
            return self._whole(*arguments, **named)
        how = tuple(str(value) for value in flat if not isinstance(value, Tensor))
        keys = [f"{how} {key}" for key in _fingerprints(given, sizes)]
        distinct = {key: keys.index(key) for key in keys}
        held = {key: features for key in distinct if (features := self._kept.get(key)) is not None}
        if len(keys) > 1 and not self._layout_seen:  # features of single pictures cannot be joined yet
            if len(distinct) == 1:
                return self._whole(*arguments, **named)
            held = {}
        missing = [picture for key, picture in distinct.items() if key not in held]
        if missing:
            chosen = [_of_pictures(each, sizes, missing) if isinstance(each, Tensor) else each for each in flat]
            some, some_named = tree_unflatten(chosen, structure)
            leaves, self._structures[how] = tree_flatten(self._whole(*some, **some_named))
            parts = _split(leaves, [sizes[picture] for picture in missing])
            if parts is None:
                self._tower.forward = self._whole  # its outputs have another layout, and always will
                return self._whole(*arguments, **named)
            self._layout_seen |= len(missing) > 1
            for picture, features in zip(missing, parts, strict=True):
                held[keys[picture]] = features
                self._kept.put(keys[picture], [_on_host(leaf) for leaf in features], sum(f.nbytes for f in features))
        of_all = zip(*(held[key] for key in keys), strict=True)
        joined = [torch.cat([part.to(given[0].device, non_blocking=True) for part in leaf]) for leaf in of_all]
        return tree_unflatten(joined, self._structures[how])


def _picture_rows(given: list[Tensor], grid: Tensor | None) -> list[int] | None:
    """How many rows of the inputs each picture has; None where that cannot be told."""
    rows = {len(tensor) if tensor.ndim else 0 for tensor in given}
    if grid is None:
        return [1] * rows.pop() if len(rows) == 1 and any(tensor.ndim >= 4 for tensor in given) else None
    sizes = grid.prod(1).tolist()
    return sizes if rows == {sum(sizes), len(sizes)} else None


def _of_pictures(tensor: Tensor, sizes: list[int], pictures: list[int]) -> Tensor:
    """The rows of some pictures, of a tensor with one row each or with all of theirs."""
    parts = tensor.split(1 if len(tensor) == len(sizes) else sizes)
    return torch.cat([parts[picture] for picture in pictures])


def _split(leaves: list[Any], sizes: list[int]) -> list[list[Tensor]] | None:
    """The outputs of each picture; None where they are no tensors whose rows are shared out as those of the inputs."""
    by_leaf, total = [], sum(sizes)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.ndim or any(size * len(leaf) % total for size in sizes):
            return None
        by_leaf.append(leaf.split([size * len(leaf) // total for size in sizes]))
    return [list(parts) for parts in zip(*by_leaf, strict=True)]


def _on_host(features: Tensor) -> Tensor:
    """A copy in the host's memory. A GPU writes it while the program goes on, and reads it in the same order."""
    copy = torch.empty_like(features, device="cpu", pin_memory=features.is_cuda)
    return copy.copy_(features, non_blocking=True)


def _fingerprints(given: list[Tensor], sizes: list[int]) -> list[str]:
    """Of each picture's inputs: two sums of their bits with random weights modulo 2⁶⁴, the same on every device and in
    every company. Unequal pictures have equal ones with a probability below 2⁻⁶⁰. Waits for the device once."""
    sums = []
    for tensor in given:
        bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()]).reshape(len(tensor), -1).long()
        for weights in _weights(bits.shape[1], bits.device):
            of_rows = (bits * weights).sum(1)
            if len(of_rows) != len(sizes):
                (places, _) = _weights(max(sizes), bits.device)
                of_rows = torch.stack([(rows * places[: len(rows)]).sum() for rows in of_rows.split(sizes)])
            sums.append(of_rows)
    shapes = [tuple(tensor.shape[1:]) for tensor in given]
    return [f"{shapes} {row}" for row in torch.stack(sums, 1).tolist()]


@lru_cache(maxsize=16)
def _weights(count: int, device: torch.device) -> Tensor:
    """int64 (2, count), odd."""
    generator = torch.Generator().manual_seed(count)
    return (torch.randint(-(2**63), 2**63 - 1, (2, count), generator=generator) | 1).to(device)
