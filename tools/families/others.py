"""Tiny models of families with queries that ask a vision tower, with experts in the text layers, or from OCR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.families.parts import TOWER, TinyVlm, chat_template, ends, finish, make_tokenizer, text_sizes, without_video


def make_blip2(folder: Path) -> TinyVlm:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokenizer = make_tokenizer([])
    processor: Any = Blip2Processor(  # adds the image token
        BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4
    )
    # The processor writes the image tokens itself, in front of everything.
    processor.chat_template = chat_template("")
    ids = tokenizer.get_vocab()
    config = Blip2Config(
        text_config={
            "model_type": "opt",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 4096,
            "dropout": 0.0,
            **ends(ids),
        },
        vision_config={**TOWER, "initializer_range": 0.02},
        qformer_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "encoder_hidden_size": 32,
        },
        num_query_tokens=4,
        image_token_index=ids["<image>"],
    )
    return finish(folder, Blip2ForConditionalGeneration, config, processor)


def make_aria(folder: Path) -> TinyVlm:
    from transformers import AriaConfig, AriaForConditionalGeneration, AriaProcessor
    from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

    tokenizer = make_tokenizer(["<image>"])
    ids = tokenizer.get_vocab()
    config = AriaConfig(
        text_config={
            "model_type": "aria_text",
            **text_sizes(len(tokenizer)),
            "moe_num_experts": 2,
            "moe_topk": 1,
            "moe_num_shared_experts": 1,
            **ends(ids),
        },
        vision_config={**TOWER, "model_type": "idefics3_vision", "image_size": 980, "patch_size": 70},
        projector_patch_to_query_dict={49: 4, 196: 8},
        image_token_index=ids["<image>"],
    )
    processor = AriaProcessor(
        image_processor=AriaImageProcessorPil(),
        tokenizer=tokenizer,
        size_conversion={490: 4, 980: 8},
        chat_template=chat_template("<image>"),
    )
    return finish(folder, AriaForConditionalGeneration, config, processor)


def make_paddleocr_vl(folder: Path) -> TinyVlm:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration, PaddleOCRVLProcessor
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

    start, end, image = "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>"
    tokenizer = make_tokenizer([start, end, "<|video_pad|>", image])
    ids = tokenizer.get_vocab()
    config = PaddleOCRVLConfig(
        text_config={
            **text_sizes(len(tokenizer)),
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "tie_word_embeddings": False,
            **ends(ids),
        },
        vision_config={**TOWER, "image_size": 64},
        image_token_id=ids[image],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[start],
        vision_end_token_id=ids[end],
        tie_word_embeddings=False,
    )
    processor = PaddleOCRVLProcessor(
        image_processor=PaddleOCRVLImageProcessorPil(
            patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
        ),
        tokenizer=tokenizer,
        chat_template=chat_template(f"{start}{image}{end}"),
    )
    return finish(folder, PaddleOCRVLForConditionalGeneration, config, processor)


def make_ernie4_5_vl_moe(folder: Path) -> TinyVlm:
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration, Ernie4_5_VLMoeProcessor
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
        Ernie4_5_VLMoeImageProcessorPil,
    )

    tokens: dict[str, Any] = {
        f"{kind}{part}_token": f"<|{kind}{part}|>" for kind in ("image", "video") for part in ("_start", "_end", "")
    }
    tokenizer = make_tokenizer(list(tokens.values()), **tokens)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    config = Ernie4_5_VLMoeConfig(
        text_config={
            **text_sizes(len(tokenizer)),
            "moe_intermediate_size": [32, 32],
            "moe_k": 1,
            "moe_num_experts": 2,
            "moe_num_shared_experts": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [6, 6, 4], "rope_theta": 10000.0},
            **ends(tokenizer.get_vocab()),
        },
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8},
        tie_word_embeddings=False,
        **ids,
    )
    processor = without_video(
        Ernie4_5_VLMoeProcessor,
        Ernie4_5_VLMoeImageProcessorPil(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}),
        tokenizer,
        chat_template("<|image_start|><|image|><|image_end|>"),
        "Ernie4_5_VLMoeVideoProcessor",
        **tokens,
        **ids,
    )
    return finish(folder, Ernie4_5_VLMoeForConditionalGeneration, config, processor)
