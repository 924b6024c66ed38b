"""The structural causal model (SCM) of CoSo: a small encoder that predicts the action from the utterance.

CoSo (Counterfactual Soft RL, arXiv 2505.03792) asks which tokens of an utterance y decide the action
a = f_act(y). Its SCM is a model of p(a | y): token and position embeddings, transformer encoder layers with
GELU, the mean over tokens, a linear head. Two things differ from the published code on purpose:

* The mean and the attention leave padding out, so that a score depends on its own utterance alone.
* An action is a vector of labels (for instance type, touch cell, lift cell, typed text), with one categorical
  head per label, not the action type only. A label of -1 marks a head that does not apply to this action.

The logits are divided by `temperature`, which is 1 unless it was fitted (see `scoring.scm.temperature`).

The heads are independent given the utterance: p(a | y) is the product, over the heads that apply to a, of the
probability of that head's label. So a change of any part of the action is a change of the action. With one head this
is the published SCM.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoring.scm.shape import ScmSizes
from scoring.settings import ScmEncoderSettings


class StructuralCausalModel(nn.Module):
    """p(action labels | utterance), one categorical distribution per head.

    It has no dropout, so it is deterministic. The result for one row does not depend on the other rows of the
    batch, nor on the padding, up to rounding. Utterances of more than `settings.max_tokens` tokens are accepted: all
    tokens from the last position on share the last position's embedding.
    """

    def __init__(self, settings: ScmEncoderSettings, sizes: ScmSizes) -> None:
        super().__init__()
        self.settings = settings
        self.sizes = sizes
        self.token_embedding = nn.Embedding(sizes.vocab_size, settings.hidden)
        self.position_embedding = nn.Embedding(settings.max_tokens, settings.hidden)
        layer = nn.TransformerEncoderLayer(
            settings.hidden,
            settings.heads,
            settings.feedforward,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.outputs = nn.ModuleList(nn.Linear(settings.hidden, size) for size in sizes.head_sizes)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_without_temperature)

    def forward(self, ids: Tensor, lengths: Tensor) -> list[Tensor]:
        """Return the logits of each head, K tensors (B, size_k), in the heads' dtype.

        ids: (B, T) int64, each row's tokens first; what follows them is padding, of any valid id.
        lengths: (B,) int64, each in 1 ... T. Raises ValueError when a length is outside that range.
        """
        batch, width = ids.shape
        if lengths.shape != (batch,) or bool(((lengths < 1) | (lengths > width)).any()):
            raise ValueError(f"lengths must be one number in 1 ... {width} for each of {batch} rows: {lengths}")
        padding = torch.arange(width, device=ids.device) >= lengths[:, None]
        encoded = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        # masked_fill, not a product with 0: it also removes values that are not finite.
        kept = encoded.masked_fill(padding[..., None], 0.0)
        return self.read_pooled(kept.sum(dim=1, dtype=self.outputs[0].weight.dtype) / lengths[:, None])

    def read(self, embedded: Tensor) -> list[Tensor]:
        """Return the logits of each head for embedded utterances without padding, (B, T, hidden)."""
        return self.read_pooled(self.encoder(embedded).mean(dim=1, dtype=self.outputs[0].weight.dtype))

    def read_pooled(self, pooled: Tensor) -> list[Tensor]:
        """Return the logits of each head for means over tokens, (B, hidden)."""
        return [output(pooled) / self.temperature for output in self.outputs]

    def embed(self, ids: Tensor) -> Tensor:
        """Return token plus position embedding, (..., T, hidden), of ids (..., T) int64."""
        places = torch.arange(ids.shape[-1], device=ids.device).clamp(max=self.settings.max_tokens - 1)
        return self.token_embedding(ids) + self.position_embedding(places)

    def log_probabilities(self, ids: Tensor, lengths: Tensor) -> list[Tensor]:
        """Return log p(label | utterance) of each head, K tensors (B, size_k); arguments as for `forward`."""
        return [functional.log_softmax(logits, dim=-1) for logits in self(ids, lengths)]

    def action_log_probability(self, ids: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Return log p(a | y), (B,): the sum over the heads that apply of the label's log-probability.

        labels: (B, K) int64, -1 where a head does not apply; a row whose labels are all -1 has log-probability 0.
        """
        return labels_log_probability(self(ids, lengths), labels)

    def action_probability(self, ids: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Return p(a | y), (B,), in [0, 1]; arguments as for `action_log_probability`."""
        return self.action_log_probability(ids, lengths, labels).exp()


def _without_temperature(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: object) -> None:
    """Weights that earlier versions of the code saved have no temperature: it was 1."""
    state.setdefault(f"{prefix}temperature", torch.ones((), dtype=torch.float64))


def label_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log softmax(logits)[label], (B,), and 0 where the label is -1.

    log p_a = -log(1 + sum over j != a of exp(x_j - x_a)). In this form 1 - p_a keeps its relative precision when p_a is
    nearly 1; log_softmax loses it. A well trained SCM is there most of the time, and influence comes from exactly
    these small differences.

    logits: (B, size); labels: (B,) int64 in -1 ... size - 1.
    """
    applies = labels >= 0
    index = labels.clamp(min=0)[:, None]
    others = logits.scatter(1, index, -torch.inf)
    odds_against = torch.logsumexp(others, dim=-1) - logits.gather(1, index)[:, 0]
    return torch.where(applies, -functional.softplus(odds_against, threshold=40.0), 0.0)


def labels_log_probability(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return log p(a | y), (B,): the sum over the heads that apply of the label's log-probability.

    logits: K tensors (B, size_k); labels: (B, K) int64, -1 where a head does not apply.
    """
    terms = [label_log_probability(head_logits, labels[:, head]) for head, head_logits in enumerate(logits)]
    return torch.stack(terms).sum(dim=0)


def labels_loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the cross-entropy in nats, summed over the heads that apply, per utterance: (B,).

    logits: K tensors (B, size_k); labels: (B, K) int64, -1 where a head does not apply.
    """
    terms = [
        functional.cross_entropy(head_logits, labels[:, head], ignore_index=-1, reduction="none")
        for head, head_logits in enumerate(logits)
    ]
    return torch.stack(terms).sum(dim=0)
