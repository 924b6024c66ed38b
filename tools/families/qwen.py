"""Tiny models of the Qwen-VL families: patches of any number, three-dimensional positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.families.parts import (
    TinyVlm,
    chat_template,
    ends,
    finish,
    make_tokenizer,
    text_sizes,
    without_video,
)

VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def make_qwen2_5_vl(folder: Path) -> TinyVlm:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    tokenizer = make_tokenizer(VISION_TOKENS, image_token="<|image_pad|>")
    config = Qwen2_5_VLConfig(
        text_config={
            **text_sizes(len(tokenizer)),
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            **ends(tokenizer.get_vocab()),
            "bos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 32,
        },
        **vision_ids(tokenizer),
    )
    return finish(
        folder,
        Qwen2_5_VLForConditionalGeneration,
        config,
        processor(Qwen2_5_VLProcessor, tokenizer, "Qwen2VLVideoProcessor"),
    )


def make_qwen2_vl(folder: Path) -> TinyVlm:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    tokenizer = make_tokenizer(VISION_TOKENS, image_token="<|image_pad|>")
    config = Qwen2VLConfig(
        text_config={
            **text_sizes(len(tokenizer)),
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            **ends(tokenizer.get_vocab()),
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 8},
        **vision_ids(tokenizer),
    )
    whole = processor(Qwen2VLProcessor, tokenizer, "Qwen2VLVideoProcessor")
    return finish(folder, Qwen2VLForConditionalGeneration, config, whole)


def make_qwen3_vl(folder: Path) -> TinyVlm:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    tokenizer = make_tokenizer(VISION_TOKENS, image_token="<|image_pad|>")
    config = Qwen3VLConfig(
        text_config={
            **text_sizes(len(tokenizer)),
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
                "rope_theta": 10000.0,
            },
            **ends(tokenizer.get_vocab()),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **vision_ids(tokenizer),
    )
    whole = processor(Qwen3VLProcessor, tokenizer, "Qwen3VLVideoProcessor")
    return finish(folder, Qwen3VLForConditionalGeneration, config, whole)


def vision_ids(tokenizer: Any) -> dict[str, Any]:
    names = ["vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"]
    return dict(zip(names, tokenizer.convert_tokens_to_ids(VISION_TOKENS), strict=True))


def processor(base: Any, tokenizer: Any, video_processor: str, **image: Any) -> Any:
    """image: what differs from the tiny models' pictures, in the words of the family's image processor."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    ids = vision_ids(tokenizer)
    return without_video(
        base,
        Qwen2VLImageProcessorPil(
            **({"patch_size": 8, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}} | image)
        ),
        tokenizer,
        chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
        video_processor,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        image_token_id=ids["image_token_id"],
        video_token_id=ids["video_token_id"],
    )
