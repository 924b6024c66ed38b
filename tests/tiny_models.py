"""Tiny random vision-language models of several families, made in code: no download.

Each `make_*` gives a `TinyVlm`: the Hugging Face model, saved to the folder too, and its chat processor. Families whose
processors AutoProcessor cannot load without torchvision are put together from their PIL image processors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.chat import ChatProcessor
from learner.supervised.default_model import DefaultModelOptions, make_default_vlm

TEXTS = [
    'The picture shows two numbers. Answer in JSON: {"thoughts": "compare them", "action": "-" or "+"}',
    '{"current number": "3", "thoughts": "the target is 5 so I should add", "action": "+"}',
    '{"current number": "2", "thoughts": "the target is 0 so I should subtract", "action": "-"}',
]
PROMPT = TEXTS[0]
TINY = DefaultModelOptions(
    hidden=32, layers=2, image_size=64, heads=4, vision_hidden=32, vision_layers=1, vocabulary=320
)


#: The sizes of a warm start's model.
SMALL = DefaultModelOptions(hidden=128, layers=2, image_size=64)


@dataclass
class TinyVlm:
    model: Any
    chat: ChatProcessor


def picture(seed: int = 0, height: int = 64, width: int = 64) -> np.ndarray:
    """A random picture, uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_idefics3(folder: Path) -> TinyVlm:
    from transformers import AutoModelForImageTextToText

    make_default_vlm(folder, TEXTS, [picture()], TINY, seed=1)
    return TinyVlm(AutoModelForImageTextToText.from_pretrained(folder), ChatProcessor(str(folder)))


def make_qwen2_5_vl(folder: Path) -> TinyVlm:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImagesOnly(Qwen2_5_VLProcessor):
        """The family's processor without its video part, which needs torchvision."""

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str = "") -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
                [self.image_token, self.video_token]
            )
            super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer = _tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    ids = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            **_text_sizes(len(tokenizer)),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": ids["<|end|>"],
            "pad_token_id": ids["<|pad|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 32,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64})
    processor = ImagesOnly(image_processor=image_processor, tokenizer=tokenizer, chat_template=_chat_template(vision))
    return _finish(folder, Qwen2_5_VLForConditionalGeneration, config, processor)


def make_llava_next(folder: Path) -> TinyVlm:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = _tokenizer(["<image>"])
    ids = tokenizer.get_vocab()
    grid = [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        text_config={"model_type": "llama", **_text_sizes(len(tokenizer)), **_ends(ids)},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 32,
        },
        image_token_id=ids["<image>"],
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
        chat_template=_chat_template("<image>"),
    )
    return _finish(folder, LlavaNextForConditionalGeneration, config, processor)


def make_gemma3(folder: Path) -> TinyVlm:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = _tokenizer(
        ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    ids = tokenizer.get_vocab()
    config = Gemma3Config(
        text_config={**_text_sizes(len(tokenizer)), "head_dim": 8, "sliding_window": 16, **_ends(ids)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=_chat_template("<start_of_image>"),
    )
    return _finish(folder, Gemma3ForConditionalGeneration, config, processor)


FAMILIES: dict[str, Callable[[Path], TinyVlm]] = {
    "idefics3": make_idefics3,
    "qwen2_5_vl": make_qwen2_5_vl,
    "llava_next": make_llava_next,
    "gemma3": make_gemma3,
}


def _tokenizer(special: list[str], **extra: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    ends = ["<|start|>", "<|end|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=ends + special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=ends[0],
        eos_token=ends[1],
        pad_token=ends[2],
        extra_special_tokens=extra or {"image_token": special[-1]},
        clean_up_tokenization_spaces=False,
    )


def _chat_template(image: str) -> str:
    return (
        "{% for message in messages %}<|start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )


def _text_sizes(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }


def _ends(ids: dict[str, int]) -> dict[str, int]:
    return {
        "bos_token_id": ids["<|start|>"],
        "eos_token_id": ids["<|end|>"],
        "pad_token_id": ids["<|pad|>"],
    }


def _finish(folder: Path, model_class: Any, config: Any, processor: Any) -> TinyVlm:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_class(config).float().eval()
        for parameter in model.parameters():
            if not parameter.any():  # a family's untrained connector may be zero, and pictures then change nothing
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return TinyVlm(model, ChatProcessor.from_parts(str(folder), config, processor))
