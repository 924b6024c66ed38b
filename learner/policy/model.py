"""The policy and its value head as one module, for any Hugging Face vision-language model.

`forward` answers what an algorithm asks of a batch: the log-probability and entropy of every response token and the
value of every state. Everything goes through `forward`, so that DeepSpeed's ZeRO 0 to 3 all work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actors.chat import NotAVisionLanguageModel
from actors.settings import AdapterTarget
from learner.policy.attention import UnsupportedAttention, attention_of
from learner.policy.batch import TokenBatch
from learner.policy.repeated_pictures import encode_repeats_once
from learner.policy.shared_prompts import hidden_states
from learner.policy.token_logprobs import SamplingDistribution, TokenHead, UnsupportedHead, measured_transform
from learner.policy.value_head import ValueHead
from learner.policy.weight_export import Materialize, adapter_weights, checkpoint_weights
from learner.settings import LoraSettings


@dataclass
class PolicyOutput:
    """Of B steps with at most R response tokens; zeros where padded."""

    logprobs: Tensor  # float32 (B, R), nats, of the response tokens
    entropy: Tensor  # float32 (B, R), nats, over the whole vocabulary, of the distribution sampled from
    values: Tensor  # float32 (B,), of the state before the response


class PolicyModel(nn.Module):
    """A vision-language model and a value head on its hidden states of the prompt.

    The value head is no submodule. So it stays float32 and whole when the module changes its precision or is spread
    over ranks. `learner.engine` trains it beside the module.
    """

    def __init__(self, vlm: nn.Module, value_head: ValueHead, value_gradient: bool) -> None:
        """vlm: a Hugging Face model whose head is a `TokenHead`, or a peft model around one; value_gradient: whether
        the value loss trains the vlm too."""
        super().__init__()
        self.vlm = vlm
        self._outside = (value_head,)  # in a tuple, so that torch does not register it
        self.value_gradient = value_gradient

    @property
    def value_head(self) -> ValueHead:
        return self._outside[0]

    @property
    def hf_model(self) -> Any:
        """The Hugging Face model, also where peft is wrapped around it."""
        vlm: Any = self.vlm
        return vlm.get_base_model() if hasattr(vlm, "get_base_model") else vlm

    def forward(
        self,
        batch: TokenBatch,
        *,
        temperature: float,
        banned_token_ids: Sequence[int],
        token_chunk: int,
        with_entropy: bool = True,
    ) -> PolicyOutput:
        """temperature and banned_token_ids as when sampling; token_chunk: tokens whose logits exist at once."""
        head = self.hf_model.get_output_embeddings()
        inputs = {
            name: tensor.to(head.weight.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in batch.model_inputs.items()
        }
        hidden, predicting = hidden_states(self.hf_model, inputs, batch)
        values = self._values(hidden if self.value_gradient else hidden.detach(), batch)

        shape, places = batch.response_mask.shape, batch.response_places
        logprobs = torch.zeros(shape.numel(), device=hidden.device)
        entropy = torch.zeros(shape.numel(), device=hidden.device)
        if shape[1] > 0:  # prompt positions never reach the head
            distribution = SamplingDistribution(temperature, banned_token_ids, token_chunk, with_entropy)
            token_logprobs, token_entropy = head(predicting, batch.response_ids.flatten()[places], distribution)
            logprobs = logprobs.index_copy(0, places, token_logprobs)
            entropy = entropy.index_copy(0, places, token_entropy)
        logprobs, entropy = logprobs.view(shape), entropy.view(shape)
        return PolicyOutput(logprobs, entropy, values)

    def _values(self, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """float32 (B,); hidden: as `hidden_states` returns it. A prompt that many steps have is read once."""
        if batch.prompt_of is None:
            return self.value_head(hidden, batch.prompt_lengths)
        lengths = batch.prompt_lengths.new_ones(len(hidden)).scatter(0, batch.prompt_of, batch.prompt_lengths)
        return self.value_head(hidden, lengths)[batch.prompt_of]

    def checkpoint_weights(self, materialize: Materialize) -> Iterator[tuple[str, Tensor]]:
        """The vlm's weights as `save_pretrained` would write them: (checkpoint name, tensor), adapters merged, tied
        weights once; the model stays as it is. See `learner.policy.weight_export.checkpoint_weights`."""
        return checkpoint_weights(self.hf_model, materialize)

    def adapter_weights(self, materialize: Materialize) -> Iterator[tuple[str, Tensor]]:
        """The adapters alone, see `learner.policy.weight_export.adapter_weights`."""
        return adapter_weights(self.hf_model, materialize)


def load_policy(
    path: str,
    *,
    dtype: torch.dtype,
    attention: str = "auto",
    lora: LoraSettings | None,
    value_hidden: tuple[int, ...],
    value_attention: int | None = None,
    gradient_checkpointing: bool,
    value_gradient: bool,
    seed: int,
) -> PolicyModel:
    """Load a Hugging Face VLM from a folder or the hub and give it a value head (and adapters).

    The value head and the adapters are drawn from `seed` alone, so every rank starts alike. Load first, hand over to
    DeepSpeed then (not under `zero.Init`). attention: `model.attention`. Raises `NotAVisionLanguageModel`,
    `UnsupportedAttention`, `UnsupportedHead`.
    """
    from transformers import AutoModelForImageTextToText

    try:
        vlm = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=attention_of(path, attention, dtype)
        )
    except UnsupportedAttention:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise NotAVisionLanguageModel(
            f"model.path {path!r} cannot be loaded as a vision-language model: {str(error).strip().splitlines()[0]}"
        ) from error
    return build_policy(
        vlm,
        lora=lora,
        value_hidden=value_hidden,
        value_attention=value_attention,
        gradient_checkpointing=gradient_checkpointing,
        value_gradient=value_gradient,
        seed=seed,
    )


def build_policy(
    vlm: Any,
    *,
    lora: LoraSettings | None,
    value_hidden: tuple[int, ...],
    value_attention: int | None = None,
    gradient_checkpointing: bool,
    value_gradient: bool,
    seed: int,
) -> PolicyModel:
    """As `load_policy`, of a Hugging Face model in memory, which becomes part of the policy (its head is adopted)."""
    head = vlm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or vlm.base_model is vlm:
        raise UnsupportedHead(f"{type(vlm).__name__} has no linear output head on a base model")
    TokenHead.adopt(head, measured_transform(vlm, vlm.base_model, head))
    encode_repeats_once(vlm.base_model)
    if gradient_checkpointing:
        vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        value_head = ValueHead(vlm.config.get_text_config().hidden_size, value_hidden, value_attention)
        policy = vlm if lora is None else _with_adapters(vlm, lora)
    return PolicyModel(policy, value_head.to(head.weight.device), value_gradient)


def _with_adapters(vlm: Any, settings: LoraSettings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=settings.dropout,
        target_modules=adapted_layers(vlm, settings.target),
    )
    # In the model's own dtype, which is that of vLLM's kernels for adapters. DeepSpeed keeps float32 copies of bfloat16
    # parameters in every ZeRO stage and rounds them anew after each step, so small steps add up.
    adapted = get_peft_model(vlm, config, autocast_adapter_dtype=False)
    if settings.serving == "merged" and vlm.dtype != torch.float32:
        from learner.policy.merged_adapters import MergedLinear

        MergedLinear.adopt(adapted)
    return adapted


def adapted_layers(vlm: Any, target: AdapterTarget) -> list[str]:
    """Names of the linear layers that get adapters, the output head never; the model may be on the meta device."""
    head = vlm.get_output_embeddings()
    inside = vlm if target == "all-linear" else vlm.get_decoder()
    wanted = {id(module) for module in inside.modules() if isinstance(module, nn.Linear) and module is not head}
    return [name for name, module in vlm.named_modules() if id(module) in wanted]
