"""Tiny models that put a vision tower's patches, or tiles of them, in place of image tokens."""

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
    without_video,
)


def make_llava_next(folder: Path) -> TinyVlm:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = make_tokenizer(["<image>"])
    ids = tokenizer.get_vocab()
    grid = [[32, 64], [64, 32], [64, 64]]
    config: Any = LlavaNextConfig(
        text_config={"model_type": "llama", **text_sizes(len(tokenizer)), **ends(ids)},
        vision_config={**TOWER, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=ids["<image>"],
        image_grid_pinpoints=grid,
        image_seq_length=16,
        vision_feature_select_strategy="default",
    )
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grid
    )
    processor = LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return finish(folder, LlavaNextForConditionalGeneration, config, processor)


def make_llava(folder: Path) -> TinyVlm:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer = make_tokenizer(["<image>"])
    ids = tokenizer.get_vocab()
    config = LlavaConfig(
        text_config={"model_type": "llama", **text_sizes(len(tokenizer)), **ends(ids)},
        vision_config={**TOWER, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=ids["<image>"],
        image_seq_length=16,
    )
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return finish(folder, LlavaForConditionalGeneration, config, processor)


def make_llava_onevision(folder: Path) -> TinyVlm:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    tokenizer = make_tokenizer(["<video>", "<image>"])
    ids = tokenizer.get_vocab()
    grid = [[32, 64], [64, 32], [64, 64]]
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_sizes(len(tokenizer)), **ends(ids)},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=grid,
    )
    processor = without_video(
        LlavaOnevisionProcessor,
        LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=grid),
        tokenizer,
        chat_template("<image>"),
        "LlavaOnevisionVideoProcessor",
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        image_token="<image>",
        video_token="<video>",
        image_token_index=ids["<image>"],
        video_token_id=ids["<video>"],
        vision_aspect_ratio="anyres_max_9",
    )
    return finish(folder, LlavaOnevisionForConditionalGeneration, config, processor)


def make_internvl(folder: Path) -> TinyVlm:
    import re

    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tokenizer = make_tokenizer(
        ["<img>", "</img>", "<video>", "<IMG_CONTEXT>"],
        start_image_token="<img>",
        end_image_token="</img>",
        video_token="<video>",
        context_image_token="<IMG_CONTEXT>",
    )
    ids = tokenizer.get_vocab()
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_sizes(len(tokenizer)), **ends(ids)},
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    processor = without_video(
        InternVLProcessor,
        GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, min_patches=1, max_patches=3, crop_to_patches=True),
        tokenizer,
        chat_template("<IMG_CONTEXT>"),
        "InternVLVideoProcessor",
        image_seq_length=4,
        start_image_token="<img>",
        end_image_token="</img>",
        start_image_token_id=ids["<img>"],
        end_image_token_id=ids["</img>"],
        image_token="<IMG_CONTEXT>",
        video_token="<video>",
        image_token_id=ids["<IMG_CONTEXT>"],
        multimodal_pattern=re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)"),
    )
    return finish(folder, InternVLForConditionalGeneration, config, processor)
