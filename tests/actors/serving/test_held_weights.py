"""What an engine holds after a load is compared with what it was given, packed and joined matrices included.

The layers here are like vLLM's on a CPU: a packed matrix lives in a closure, and the parameter it came from is gone.
The live engine is in test_weight_transfer.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from actors.serving.held_weights import HeldWeights, checkpoint_fingerprints, fingerprint

HIDDEN, VOCABULARY = 96, 50


class Packed(nn.Module):
    """A linear layer of joined matrices."""

    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.output_partition_sizes = list(rows)
        self.input_size_per_partition = HIDDEN
        self.weight = nn.Parameter(torch.empty(0))

    def load(self, *matrices: Tensor) -> None:
        packed = torch.cat(matrices).t().contiguous()
        self.cpu_linear = lambda x, weight, bias: x @ packed


class Engine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Module()
        self.embedding.weight = nn.Parameter(torch.zeros(64, HIDDEN))  # padded from 50 rows
        self.embedding.org_vocab_size = VOCABULARY
        self.qkv = Packed(HIDDEN, 32, 32)
        self.norm = nn.LayerNorm(HIDDEN)

    def load(self, tensors: dict[str, Tensor], but_not: str = "") -> None:
        with torch.no_grad():
            if but_not != "embedding":
                self.embedding.weight[:VOCABULARY] = tensors["embed.weight"]
            if but_not != "qkv":
                self.qkv.load(tensors["q.weight"], tensors["k.weight"], tensors["v.weight"])
            if but_not != "norm":
                self.norm.weight.copy_(tensors["norm.weight"])
                self.norm.bias.copy_(tensors["norm.bias"])


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (VOCABULARY, HIDDEN), "q.weight": (HIDDEN, HIDDEN), "k.weight": (32, HIDDEN),
        "v.weight": (32, HIDDEN), "norm.weight": (HIDDEN,), "norm.bias": (HIDDEN,),
    }  # fmt: skip
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["q.weight"][0] = -0.0  # which a product with 1 and 0 makes 0.0
    return drawn


def given(weights: dict[str, Tensor]) -> dict[str, object]:
    return {name: fingerprint(tensor) for name, tensor in weights.items()}


@pytest.mark.parametrize("alike", [False, True], ids=["distinct", "weights and biases of the norm alike at first"])
@pytest.mark.parametrize("stale", ["", "embedding", "qkv", "norm"])
def test_every_tensor_is_found_where_it_is_held_and_a_stale_one_is_told(
    tmp_path: Path, alike: bool, stale: str
) -> None:
    engine, first = Engine(), tensors(1)
    if alike:
        first["norm.weight"] = first["norm.bias"] = torch.zeros(HIDDEN)
        first["v.weight"] = first["k.weight"]
    save_file({name: tensor.clone() for name, tensor in first.items()}, tmp_path / "model.safetensors")
    engine.load(first)
    held = HeldWeights(engine, checkpoint_fingerprints(tmp_path, torch.float32))
    for seed in (2, 3):
        engine.load(new := tensors(seed))
        assert held.compare(given(new)) == (set(new), [])
    engine.load(new := tensors(4), but_not=stale)
    equal, wrong = held.compare(given(new))
    pieces = {"": 0, "embedding": 1, "qkv": 3, "norm": 2}[stale]
    assert len(wrong) == pieces and len(equal) == len(new) - pieces
    assert all(piece.startswith(stale) for piece in wrong)


def test_what_vllm_changes_is_not_compared() -> None:
    engine, weights = Engine(), tensors(1)
    engine.load(weights)
    others = given({name: tensor * 2 if name == "embed.weight" else tensor for name, tensor in weights.items()})
    held = HeldWeights(engine, others)
    engine.load(new := tensors(2))
    assert held.compare(given(new)) == (set(new) - {"embed.weight"}, [])
