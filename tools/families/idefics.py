"""Tiny models of the Idefics families: pictures with masks of real pixels."""

from __future__ import annotations

from pathlib import Path

from learner.supervised.default_model import DefaultModelOptions, make_default_vlm
from tools.families.parts import (
    TEXTS,
    TINY,
    TOWER,
    TinyVlm,
    chat_template,
    ends,
    finish,
    make_tokenizer,
    picture,
    text_sizes,
    without_video,
)

#: Of pictures of up to 64 × 64 pixels.
VISION = {**TOWER, "num_attention_heads": 2, "image_size": 64}


def make_idefics3(folder: Path, options: DefaultModelOptions = TINY) -> TinyVlm:
    from transformers import AutoModelForImageTextToText

    from actors.chat import ChatProcessor

    make_default_vlm(folder, TEXTS, [picture()], options, seed=1)
    return TinyVlm(AutoModelForImageTextToText.from_pretrained(folder), ChatProcessor(str(folder)))


def make_idefics2(folder: Path) -> TinyVlm:
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Processor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    tokenizer = make_tokenizer(
        ["<fake_token_around_image>", "<end_of_utterance>", "<image>"],
        image_token="<image>",
        image_boundary_token="<fake_token_around_image>",
    )
    ids = tokenizer.get_vocab()
    config = Idefics2Config(
        text_config={"model_type": "mistral", **text_sizes(len(tokenizer)), **ends(ids)},
        vision_config=VISION,
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 32,
            "num_key_value_heads": 1,
        },
        image_token_id=ids["<image>"],
    )
    processor = Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    return finish(folder, Idefics2ForConditionalGeneration, config, processor)


def make_smolvlm(folder: Path) -> TinyVlm:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tokenizer = make_tokenizer(
        ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>", "<image>"],
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    ids = tokenizer.get_vocab()
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **text_sizes(len(tokenizer)), **ends(ids)},
        vision_config=VISION,
        image_token_id=ids["<image>"],
        pad_token_id=ids["<|pad|>"],
        scale_factor=4,
    )
    processor = without_video(
        SmolVLMProcessor,
        SmolVLMImageProcessorPil(
            size={"longest_edge": 128}, max_image_size={"longest_edge": 64}, do_image_splitting=True
        ),
        tokenizer,
        chat_template("<image>"),
        "SmolVLMVideoProcessor",
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        image_token_id=ids["<image>"],
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
        image_seq_len=4,
        video_token="<video>",
    )
    return finish(folder, SmolVLMForConditionalGeneration, config, processor)
