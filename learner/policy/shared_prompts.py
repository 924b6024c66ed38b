"""One pass over a prompt for all answers to it.

Steps of a batch often have the same prompt and picture: an environment with few states, several answers to one prompt.
The hidden states of a prompt depend on nothing that follows it. So the model runs each prompt once, and each answer on
the keys and values of its prompt, as an engine does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from learner.policy.batch import TokenBatch


def shares_prompts(vlm: Any) -> bool:
    """Whether a Hugging Face VLM can: every text layer attends to all that comes before, and positions count on by one
    (in some families an image takes up fewer positions than tokens)."""
    text = vlm.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    layers = getattr(text, "layer_types", None)
    if layers is None:
        layers = ["full_attention" if getattr(text, "sliding_window", None) is None else "sliding_attention"]
    return "rope_theta" in rope and "mrope_section" not in rope and set(layers) == {"full_attention"}


def hidden_states(vlm: Any, inputs: dict[str, Tensor], batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(of the prompts, which may have more behind them (P, L, width); those that predict the T response tokens in the
    order of the mask (T, width)). P is the number of prompts in `inputs`: as in `TokenBatch.model_inputs`.

    vlm: a Hugging Face VLM; inputs: `batch.model_inputs` in the model's precision.
    """
    from transformers import DynamicCache

    mask = batch.response_mask
    if batch.prompt_of is None:
        hidden = vlm.base_model(**inputs, use_cache=False).last_hidden_state
        # Response token j is predicted at the position before it.
        length = max(mask.shape[1], 1)
        row, token = batch.response_places // length, batch.response_places % length
        return hidden, hidden[row, batch.prompt_lengths[row] - 1 + token]
    cache = DynamicCache()
    hidden = vlm.base_model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
    state = hidden[batch.prompt_of, batch.prompt_lengths - 1]
    length = mask.shape[1]
    if length < 2:
        return hidden, state[:, None].expand(-1, length, -1).flatten(0, 1)[batch.response_places]
    cache.batch_select_indices(batch.prompt_of)
    seen = [inputs["attention_mask"][batch.prompt_of], mask[:, :-1].to(inputs["attention_mask"].dtype)]
    answers = vlm.get_decoder()(
        input_ids=batch.response_ids[:, :-1],
        attention_mask=torch.cat(seen, 1),
        position_ids=batch.prompt_lengths[:, None] + torch.arange(length - 1, device=hidden.device),
        past_key_values=cache,
        use_cache=True,
    )
    return hidden, torch.cat([state[:, None], answers.last_hidden_state], 1).flatten(0, 1)[batch.response_places]
