"""Tiny models of Google's families, in which tokens of a picture attend to each other both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.families.parts import (
    TOWER,
    TinyVlm,
    chat_template,
    ends,
    finish,
    make_tokenizer,
    text_sizes,
)


def make_gemma3(folder: Path) -> TinyVlm:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = make_tokenizer(
        ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    ids = tokenizer.get_vocab()
    config = Gemma3Config(
        text_config={**text_sizes(len(tokenizer)), "head_dim": 32, "sliding_window": 16, **ends(ids)},
        vision_config=TOWER,
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>"),
    )
    return finish(folder, Gemma3ForConditionalGeneration, config, processor)


def make_paligemma(folder: Path) -> TinyVlm:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = make_tokenizer(["<image>"])
    image_processor: Any = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template("<image>")
    )
    ids = tokenizer.get_vocab()
    config = PaliGemmaConfig(
        text_config={
            "model_type": "gemma",
            **text_sizes(len(tokenizer)),
            "head_dim": 32,
            **ends(ids),
        },
        vision_config={
            **TOWER,
            "model_type": "siglip_vision_model",
            "projection_dim": 64,
            "vision_use_head": False,
        },
        image_token_index=ids["<image>"],
        vocab_size=len(tokenizer),
        projection_dim=64,
        hidden_size=64,
    )
    return finish(folder, PaliGemmaForConditionalGeneration, config, processor)
