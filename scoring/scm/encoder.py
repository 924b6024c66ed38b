"""The SCM asked about one utterance and all its counterfactuals at once: the pool's fast path.

It computes what `StructuralCausalModel.forward` does for each of them, arranged for speed:

* All of an utterance's counterfactuals have its length, so no linear layer computes padding (attention: see
  `scoring.scm.attention`).
* A counterfactual's first layer reads rows that are either the utterance's own or the null token's at that
  place. Embeddings, queries, keys and values of both are computed once, for 2 n rows; each counterfactual picks
  its rows from them. From there on every row of a counterfactual differs.
* Linear layers have their weights laid out for the machine once per version (`scoring.scm.linear`).
* Rows go through the layers in runs of whole counterfactuals short enough to stay in a core's cache, where matrix
  multiplication runs at the machine's peak and the element-wise parts cost little.

How an utterance is cut into runs depends on its length alone, and nothing of another utterance is in them. So its
result is the same to the last bit whatever else is scored, in which order, and by which worker.
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
    """Bring the SCM, in place, into one of `PRECISIONS` for scoring. Its heads are in float64 all the same, and so is
    the mean over tokens that they read: an effect is a small difference of what they say, and they cost nothing."""
    scm.to(PRECISIONS[precision])
    scm.outputs.double()
    return scm.eval()


class CounterfactualEncoder:
    """Answers for an SCM, in its parameters' precision and on their device.

    scm: read at every call, so its weights may be loaded anew in between.
    window, null_id: what nulling is (see `scoring.effects.effects`). batch_tokens: tokens of a run, at least one
    counterfactual; about 1,500 fill a CPU core's cache, a GPU wants 100,000 and more.
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
        self._parameters = list(scm.encoder.parameters())  # what holds the weights stays, whatever is loaded
        self._packed: list[_PackedLayer] = []
        self._packed_version: list[tuple[int, int]] = []

    @torch.inference_mode()
    def probabilities_less_one(
        self, ids: NDArray[np.integer], positions: NDArray[np.integer], labels: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """Return p(a | y) - 1 of the utterance, then of each counterfactual: float64 (1 + m,).

        p - 1 rather than p: differences of probabilities near 1 keep their digits.
        ids: (n,), n >= 1. positions: (m,) where windows begin. labels: (K,), -1 where a head does not apply.
        """
        pooled = self._pooled(ids, positions)
        logits = self.scm.read_pooled(pooled)
        wanted = torch.from_numpy(labels.astype(np.int64)).to(pooled.device).expand(len(pooled), -1)
        less_one = torch.expm1(labels_log_probability(logits, wanted))
        return less_one.to("cpu", torch.float64).numpy()

    def _pooled(self, ids: NDArray[np.integer], positions: NDArray[np.integer]) -> Tensor:
        """The encoder's mean over tokens, (1 + m, hidden)."""
        length, hidden = len(ids), self.scm.settings.hidden
        device = self.scm.token_embedding.weight.device
        tokens = torch.from_numpy(np.stack([ids, np.full(length, self.null_id)]).astype(np.int64)).to(device)
        first = self.scm.encoder.layers[0].self_attn
        embedded = self.scm.embed(tokens).view(2 * length, hidden)
        # Row j: the token's own; row n + j: the null token's at its place.
        shared = torch.cat([embedded, functional.linear(embedded, first.in_proj_weight, first.in_proj_bias)], dim=1)
        places = torch.arange(length, device=device)
        # A window that begins at the utterance's end nulls nothing: that is the utterance itself.
        begins = torch.from_numpy(np.concatenate([[length], positions]).astype(np.int64)).to(device)[:, None]
        packed = self._packed_layers()
        pooled = []
        for run in begins.split(max(1, self.batch_tokens // length)):
            null = (places >= run) & (places < run + self.window)
            rows = shared.index_select(0, (places + length * null).view(-1))
            pooled.append(self._encode(rows[:, :hidden], rows[:, hidden:], len(run), packed))
        return torch.cat(pooled)

    def _encode(self, rows: Tensor, projected: Tensor, count: int, packed: list[_PackedLayer]) -> Tensor:
        """Run `count` sequences, end to end in rows (count * n, hidden), through the encoder; (count, hidden).

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
        """The encoder's linear layers with the present weights."""
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
