"""Does an engine hold the tensors that it was given? A comparison of what its layers hold after a load.

vLLM joins some tensors of a checkpoint (query, key and value), and on CPUs it packs the matrix of a linear layer for
its kernels and drops the original. The product with unit vectors gives columns of a packed matrix back, exactly, since
one factor of each sum is 1 and the others are 0. So every tensor is compared by a fingerprint: of a matrix, some of its
columns.

Which piece of the engine is which tensor shows at the start: they are equal then, for vLLM has just loaded the model's
own files. Pieces that are like no tensor (vLLM changed them, or they are shares of a tensor among several GPUs) are not
compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.model_folder import weight_files
from actors.serving.weight_transfer import tensor_checksum

#: Columns of a matrix that its fingerprint takes, evenly spread; all where there are fewer.
COLUMNS = 32

Fingerprint = tuple[tuple[int, ...], int]
"""Shape of a tensor, and the checksum of what is taken of it."""


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Of a whole tensor: a matrix (N, K), or any other."""
    shape = tuple(tensor.shape)
    return shape, _checksum(tensor[:, _columns(shape[1], tensor.device)] if len(shape) == 2 else tensor)


def fingerprinted(
    named_tensors: Iterable[tuple[str, Tensor]], fingerprints: dict[str, Fingerprint]
) -> Iterator[tuple[str, Tensor]]:
    """The same pairs; writes the fingerprint of each into `fingerprints` as it passes."""
    for name, tensor in named_tensors:
        fingerprints[name] = fingerprint(tensor)
        yield name, tensor


def checkpoint_fingerprints(folder: Path, dtype: torch.dtype) -> dict[str, Fingerprint]:
    """Of every tensor that a model folder's safetensors files hold, as an engine with this dtype holds it."""
    from safetensors import safe_open

    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                found[name] = fingerprint(file.get_tensor(name).to(dtype))
    return found


class HeldWeights:
    """Which tensors each piece of the engine's model may be; every load narrows that down."""

    def __init__(self, model: Any, loaded: Mapping[str, Fingerprint]) -> None:
        """loaded: of the tensors that the model has just loaded."""
        self._model = model
        names: dict[Fingerprint, set[str]] = {}
        for name, value in loaded.items():
            names.setdefault(value, set()).add(name)
        self._may_be = {piece: names[value] for piece, value in held_fingerprints(model).items() if value in names}

    def compare(self, given: Mapping[str, Fingerprint]) -> tuple[set[str], list[str]]:
        """After a load: the tensors that are held as given, and the pieces that are none of those which they were."""
        equal: set[str] = set()
        wrong = []
        for piece, value in held_fingerprints(self._model).items():
            if not (candidates := self._may_be.get(piece)):
                continue
            if found := {name for name in candidates if given.get(name) == value}:
                self._may_be[piece] = found
                equal |= found
            else:
                wrong.append(piece)
        return equal, wrong


def held_fingerprints(model: Any) -> dict[str, Fingerprint]:
    """Of every piece of a model in an engine: a parameter or packed matrix, cut where vLLM joined tensors."""
    found = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            packed = name == "weight" and hasattr(module, "cpu_linear")
            whole = _packed_columns(module) if packed else parameter.detach()
            if whole is None or not whole.numel():
                continue
            for number, part in enumerate(_parts(module, whole)):
                shape = (len(part), _width(module)) if packed else tuple(part.shape)
                matrix = part if packed or part.dim() != 2 else part[:, _columns(part.shape[1], part.device)]
                found[f"{module_name}.{name}[{number}]"] = shape, _checksum(matrix)
    return found


def _packed_columns(module: Any) -> Tensor | None:
    """Columns (N, COLUMNS) of the matrix that a linear layer multiplies by; None where it has none of its own."""
    width = _width(module)
    if not width:
        return None
    columns = _columns(width, module.weight.device)
    units = torch.zeros(len(columns), width, dtype=module.weight.dtype, device=module.weight.device)
    units[torch.arange(len(columns)), columns] = 1
    with torch.no_grad():
        return module.cpu_linear(units, module.weight, None).T


def _width(module: Any) -> int:
    """K of a linear layer's matrix (N, K), 0 where it is not known."""
    return int(getattr(module, "input_size_per_partition", 0) or getattr(module, "embedding_dim", 0))


def _parts(module: Any, whole: Tensor) -> tuple[Tensor, ...]:
    if (rows := getattr(module, "org_vocab_size", None)) is not None:
        return (whole[:rows],)  # an embedding's rows are padded
    sizes = list(getattr(module, "output_partition_sizes", []))
    return whole.split(sizes) if len(sizes) > 1 and sum(sizes) == len(whole) else (whole,)


def _columns(width: int, device: torch.device) -> Tensor:
    return torch.linspace(0, width - 1, min(width, COLUMNS), device=device).long()


def _checksum(tensor: Tensor) -> int:
    return tensor_checksum(tensor.detach() + 0)  # -0.0 becomes 0.0, as in a product
