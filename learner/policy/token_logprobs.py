"""Log-probabilities and entropies of given tokens, a chunk of tokens at a time.

The logits of a batch, (tokens, vocabulary), are the largest array of a language model's training step. Here they exist
for `token_chunk` tokens at a time only: a chunk is reduced to one log-probability and one entropy per token, and made
again in the backward pass. Where all tokens fit into one chunk, its logits are kept: the backward pass would begin by
making just these again.

Logits are float32 whatever the model's precision, as the engine's are (`actors.serving.policy_engine.float32_head`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LogitTransform:
    """What a model family does to its head's output: logits = cap · tanh(scale · output / cap), without the cap
    logits = scale · output."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, output: Tensor) -> Tensor:
        scaled = output * self.scale if self.scale != 1.0 else output
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


@dataclass(frozen=True)
class SamplingDistribution:
    """How logits become the distribution that was sampled from, and how many tokens are worked on at once."""

    temperature: float  # > 0
    banned_token_ids: Sequence[int]  # have probability 0
    token_chunk: int  # tokens whose logits exist at once
    with_entropy: bool = True  # entropies are zeros without it


class Float32Product(torch.autograd.Function):
    """hidden (n, K) · weight (V, K)ᵀ -> float32 (n, V), of bfloat16 or float16 factors; gradients in their precision.

    A product of two such numbers is exact in float32, so the sums are those of the factors converted to float32. On
    CUDA the matrix product adds up in float32 anyway, and writes its sums as they are: no float32 copy of the head,
    2.2 GB for one of 152k × 3,584, is made for each chunk. PyTorch has no such product for CPUs, and no derivative.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return functional.linear(hidden.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        gradient = gradients[0].to(weight.dtype)
        of_hidden = gradient @ weight if ctx.needs_input_grad[0] else None
        return of_hidden, gradient.T @ hidden if ctx.needs_input_grad[1] else None


class TokenHead(nn.Linear):
    """A model's output head that can also answer for given tokens without showing all its logits.

    Under ZeRO-3 a weight exists only inside its own module's forward; so the chunking happens in here, in one call per
    forward pass whatever the number of tokens (ranks with different numbers of tokens stay in step).
    """

    transform = LogitTransform()

    @classmethod
    def adopt(cls, head: nn.Linear, transform: LogitTransform) -> TokenHead:
        """Turn a model's own head into a `TokenHead`, in place: same weight, same ties, same name."""
        head.__class__ = cls
        assert isinstance(head, cls)
        head.transform = transform
        return head

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, distribution: SamplingDistribution | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden (…, width) -> logits (…, vocabulary) before the family's transform, as any output head.

        With `targets` int64 (N,) and `distribution`: hidden (N, width) -> log-probabilities float32 (N,) of the
        targets and entropies float32 (N,) of the distribution over the whole vocabulary, both in nats.
        """
        if targets is None or distribution is None:
            return super().forward(hidden)
        banned = torch.zeros(self.out_features, dtype=torch.bool, device=hidden.device)
        banned[list(distribution.banned_token_ids)] = True

        def of_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.transform(self._outputs(hidden)) / distribution.temperature
            return _logprob_and_entropy(logits, targets, banned, distribution.with_entropy)

        if len(targets) <= distribution.token_chunk:
            return of_chunk(hidden, targets)
        chunks = zip(hidden.split(distribution.token_chunk), targets.split(distribution.token_chunk), strict=True)
        results = [
            checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else of_chunk(*chunk)
            for chunk in chunks
        ]
        logprobs, entropies = zip(*results, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _outputs(self, hidden: Tensor) -> Tensor:
        """hidden (n, width) -> float32 (n, vocabulary)"""
        if self.weight.dtype not in (torch.bfloat16, torch.float16):
            return functional.linear(hidden, self.weight, self.bias).float()
        output = Float32Product.apply(hidden, self.weight)
        return output if self.bias is None else output + self.bias


def _logprob_and_entropy(logits: Tensor, targets: Tensor, banned: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """logits float32 (n, V), targets (n,), banned bool (V,) -> float32 (n,), float32 (n,)."""
    logprobs = logits.masked_fill(banned, -torch.inf).log_softmax(-1)
    chosen = logprobs.gather(-1, targets[:, None])[:, 0]
    if not with_entropy:
        return chosen, torch.zeros_like(chosen)
    # p log p is 0 where p is 0; written out, 0 · −inf would be NaN.
    return chosen, -(logprobs.exp() * logprobs.masked_fill(banned, 0.0)).sum(-1)


class UnsupportedHead(ValueError):
    """The model's way from hidden states to logits is not one the learner reproduces."""


def measured_transform(vlm: Any, body: nn.Module, head: nn.Linear) -> LogitTransform:
    """What `vlm` does between the hidden states of its `body` and its logits, apart from its `head`, measured.

    The head is made to answer with known numbers on a two-token prompt, and the model's logits show what became of
    them. Raises `UnsupportedHead` for anything but a factor and a soft cap that the model's config states.
    """
    dtype = head.weight.dtype
    ramp = torch.linspace(-200.0, 200.0, head.out_features, device=head.weight.device).to(dtype)
    seen: dict[str, Tensor] = {}

    def remember_hidden(_module: nn.Module, _inputs: object, output: object) -> None:
        seen["hidden"] = output.last_hidden_state  # type: ignore[attr-defined]

    def answer(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["head_input"] = inputs[0]
        return ramp.expand_as(output)

    hooks = [body.register_forward_hook(remember_hidden), head.register_forward_hook(answer)]
    training = vlm.training
    ids = torch.tensor([_text_token_ids(vlm.config, 2)], device=head.weight.device)
    try:
        with torch.no_grad():
            output = vlm.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        vlm.train(training)
        for hook in hooks:
            hook.remove()
    logits = output.logits[0, -1].float()
    if "hidden" in seen and "head_input" in seen and torch.equal(seen["hidden"], seen["head_input"]):
        for transform in _stated_transforms(vlm.config.get_text_config()):
            if torch.allclose(transform(ramp.float()), logits, rtol=1e-5 if dtype == torch.float32 else 2e-2):
                return transform
    raise UnsupportedHead(
        f"{type(vlm).__name__} does something between its last hidden states and its logits that this learner does "
        "not know (known: a linear head, a constant factor, a soft cap), so its log-probabilities would be wrong"
    )


def _stated_transforms(text_config: object) -> list[LogitTransform]:
    """What the config states, in the families' own words; which of them the model applies is to be measured."""
    scales = [1.0]
    if factor := getattr(text_config, "logit_scale", None):
        scales.append(factor)
    if factor := getattr(text_config, "logits_scaling", None):
        scales += [factor, 1.0 / factor]  # one family multiplies where another divides
    caps = [None]
    if cap := getattr(text_config, "final_logit_softcapping", None):
        caps.append(cap)
    return [LogitTransform(scale, cap) for scale in scales for cap in caps]


def _text_token_ids(config: object, count: int) -> list[int]:
    """Some token ids that stand for text, whatever the model's image tokens are."""
    named = {value for name, value in vars(config).items() if "token" in name and isinstance(value, int)}
    return [index for index in range(count + len(named)) if index not in named][:count]
