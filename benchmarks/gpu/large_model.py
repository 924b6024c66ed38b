"""A vision-language model of 2 billion random weights, made on the spot, for the two scripts about large models.

The architecture is Qwen2.5-VL's with the text model of its 2 B member; the tokenizer has the full 151,936 words.
"""

from __future__ import annotations

from pathlib import Path

import torch

VOCABULARY = 151_936
TEXT = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "out_hidden_size": 1536,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
}
#: Of a rehearsal.
SMALL_TEXT = TEXT | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
}
SMALL_VISION = (
    VISION
    | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    | {
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
)


def make_model(folder: str, device: str) -> dict[str, int]:
    """Write the model and its processor in bf16, or a tiny one on a CPU; returns the numbers of weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    from tools.families.parts import ends, make_tokenizer, save_processor
    from tools.families.qwen import VISION_TOKENS, processor, vision_ids

    large = device == "cuda"
    words = VOCABULARY if large else 2_000
    tokenizer = make_tokenizer(
        VISION_TOKENS, vocabulary=words, image_token="<|image_pad|>", video_token="<|video_pad|>"
    )
    config = Qwen2_5_VLConfig(
        text_config={
            **(TEXT if large else SMALL_TEXT),
            "vocab_size": words,
            **ends(tokenizer.get_vocab()),
            "bos_token_id": None,
        },
        vision_config=VISION if large else SMALL_VISION,
        tie_word_embeddings=True,
        **vision_ids(tokenizer),
    )
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    save_processor(
        Path(folder),
        processor(
            Qwen2_5_VLProcessor,
            tokenizer,
            "Qwen2VLVideoProcessor",
            patch_size=14,
            size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        ),
    )
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    return {"vision": counts["visual"], "text": counts["language_model"]}
