"""What a model's layers compute attention with: which of PyTorch's and other packages' ways there are for it here."""

from __future__ import annotations

from typing import Any

import torch


class UnsupportedAttention(ValueError):
    """The model, its precision or this machine has no such attention; the message names those that there are."""


def attention_choices(config: Any, dtype: torch.dtype) -> list[str]:
    """Values of `model.attention`, besides auto, for a model of this Hugging Face config, the slowest first."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    choices = ["eager"]
    if model_class._supports_sdpa:
        choices.append("sdpa")
    if model_class._supports_flash_attn and dtype in (torch.bfloat16, torch.float16):
        # Without the package, transformers would look for a kernel on the hub, which is code of others.
        if is_flash_attn_2_available():
            choices.append("flash_attention_2")
        if is_flash_attn_3_available():
            choices.append("flash_attention_3")
    return choices


def attention_of(path: str, attention: str, dtype: torch.dtype) -> str | None:
    """What `from_pretrained` is told as `attn_implementation`; attention: `model.attention`. None leaves the choice to
    transformers: sdpa where the family supports it, else eager. Raises `UnsupportedAttention`."""
    if attention == "auto":
        return None
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    choices = attention_choices(config, dtype)
    if attention not in choices:
        raise UnsupportedAttention(
            f"model.attention {attention} is not to be had for {config.model_type} in {str(dtype)[6:]} here: choose "
            f"auto or one of {', '.join(choices)}. Flash attention needs a GPU, bfloat16, a family that supports it, "
            "and the package flash-attn (3: flash-attn-3)."
        )
    return attention
