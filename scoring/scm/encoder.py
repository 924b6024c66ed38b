"""The SCM evaluated on one utterance and all its counterfactuals at once: the scorers' fast path.

The result is that of `StructuralCausalModel.forward` for each of them. It is faster, because:

* All counterfactuals of an utterance have its length, so linear layers compute no padding (attention: see
  `scoring.scm.attention`).
* Each input row of a counterfactual's first layer is either the utterance's own or that of the null token at the same
  position. Embeddings, queries, keys and values of both are computed once, for 2 n rows, and each counterfactual
  selects its rows from them. After the first layer, every row of a counterfactual is different.
* The weights of linear layers are packed once per version (`scoring.scm.linear`).
* Rows go through the layers in chunks of whole counterfactuals. A chunk fits into a core's cache, where matrix
  multiplication reaches the machine's peak and the element-wise parts cost little.

The chunks of an utterance depend on its length alone and hold no other utterance. So its result is the same to the last
bit whatever else is scored, in which order, and by which worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from scoring.scm.attention import self_attention
from scoring.scm.linear import PackedLinear
from scoring.scm.model import StructuralCausalModel, labels_log_probability
from scoring.settings import Precision

PRECISIONS: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Precision)}


def in_precision(scm: StructuralCausalModel, precision: str) -> StructuralCausalModel:
    """Convert the SCM, in place, to one of `PRECISIONS`, and to evaluation mode.

    The heads, the mean over tokens that they read, and the temperature stay in float64: an effect is a small difference
    between their outputs, and they cost almost nothing.
    """
    temperature = scm.temperature.double()
    scm.to(PRECISIONS[precision])
    scm.outputs.double()
    scm.temperature = temperature
    return scm.eval()


class CounterfactualEncoder:
    """Evaluates an SCM, in its parameters' precision and on their device.

    scm: read at every call, so new weights may be loaded between calls.
    window, null_id: as in `scoring.effects.effects`. batch_tokens: tokens of a chunk, which holds at least one
    counterfactual. About 1,500 fill a CPU core's cache; a GPU needs 100,000 and more.
    """

    def __init__(self, scm: StructuralCausalModel, *, window: int, null_id: int, batch_tokens: int) -> None:
        if window < 1 or batch_tokens < 1:
            raise ValueError(f"window ({window}) and batch_tokens ({batch_tokens}) must be at least 1")
        if not 0 <= null_id < scm.sizes.vocab_size:
            raise ValueError(f"null_id is {null_id}, but the SCM knows 0 to {scm.sizes.vocab_size - 1}")
        self.scm = scm
        self.window = window
        self.null_id = null_id
        self.batch_tokens = batch_tokens
        self._parameters = list(scm.encoder.parameters())  # loading writes into these same tensors
        self._packed: list[_PackedLayer] = []
        self._packed_version: list[tuple[int, int]] = []

    @torch.inference_mode()
    def probabilities_minus_one(
        self, ids: NDArray[np.integer], positions: NDArray[np.integer], labels: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """Return p(a | y) - 1 of the utterance, then of each counterfactual: float64 (1 + m,).

        p - 1 instead of p keeps the digits of differences between probabilities near 1.
        ids: (n,), n >= 1. positions: (m,) where windows begin. labels: (K,), -1 where a head does not apply.
        """
        pooled = self._pooled(ids, positions)
        logits = self.scm.read_pooled(pooled)
        wanted = torch.from_numpy(labels.astype(np.int64)).to(pooled.device).expand(len(pooled), -1)
        minus_one = torch.expm1(labels_log_probability(logits, wanted))
        return minus_one.to("cpu", torch.float64).numpy()

    def _pooled(self, ids: NDArray[np.integer], positions: NDArray[np.integer]) -> Tensor:
        """Return the encoder's mean over tokens, (1 + m, hidden)."""
        length, hidden = len(ids), self.scm.settings.hidden
        device = self.scm.token_embedding.weight.device
        tokens = torch.from_numpy(np.stack([ids, np.full(length, self.null_id)]).astype(np.int64)).to(device)
        first = self.scm.encoder.layers[0].self_attn
        embedded = self.scm.embed(tokens).view(2 * length, hidden)
        # Row j belongs to token j, row n + j to the null token at the same position.
        shared = torch.cat([embedded, functional.linear(embedded, first.in_proj_weight, first.in_proj_bias)], dim=1)
        places = torch.arange(length, device=device)
        # A window that begins at the utterance's end nulls nothing: the first row is the utterance itself.
        begins = torch.from_numpy(np.concatenate([[length], positions]).astype(np.int64)).to(device)[:, None]
        packed = self._packed_layers()
        pooled = []
        for chunk in begins.split(max(1, self.batch_tokens // length)):
            null = (places >= chunk) & (places < chunk + self.window)
            rows = shared.index_select(0, (places + length * null).view(-1))
            pooled.append(self._encode(rows[:, :hidden], rows[:, hidden:], len(chunk), packed))
        return torch.cat(pooled)

    def _encode(self, rows: Tensor, projected: Tensor, count: int, packed: list[_PackedLayer]) -> Tensor:
        """Run `count` sequences, one after the other in rows (count * n, hidden), through the encoder; (count, hidden).

        projected: the first layer's queries, keys and values, (count * n, 3 * hidden).
        """
        settings = self.scm.settings
        for index, (layer, of_layer) in enumerate(zip(self.scm.encoder.layers, packed, strict=True)):
            if index:
                projected = of_layer.projections(rows)
            mixed = self_attention(projected, count, settings.heads)
            rows = layer.norm1(of_layer.attention_output(mixed).add_(rows))
            rows = layer.norm2(of_layer.second(of_layer.first.gelu(rows)).add_(rows))
        return rows.view(count, -1, settings.hidden).mean(dim=1, dtype=next(self.scm.outputs.parameters()).dtype)

    def _packed_layers(self) -> list[_PackedLayer]:
        """Return the encoder's linear layers with the current weights, packed."""
        version = [(each.data_ptr(), each._version) for each in self._parameters]
        if version != self._packed_version:
            self._packed = [
                _PackedLayer(
                    projections=self._pack(layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias),
                    attention_output=self._pack(layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias),
                    first=self._pack(layer.linear1.weight, layer.linear1.bias),
                    second=self._pack(layer.linear2.weight, layer.linear2.bias),
                )
                for layer in self.scm.encoder.layers
            ]
            self._packed_version = version
        return self._packed

    def _pack(self, weight: Tensor, bias: Tensor) -> PackedLinear:
        return PackedLinear(weight, bias, self.batch_tokens)


@dataclass(frozen=True)
class _PackedLayer:
    projections: PackedLinear
    attention_output: PackedLinear
    first: PackedLinear
    second: PackedLinear
