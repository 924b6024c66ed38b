"""Tiny random vision-language models of several families, made in code: no download.

Each `make_*` gives a `TinyVlm`: the Hugging Face model, saved to the folder too, and its chat processor. Families whose
processors need torchvision are put together from their PIL image processors, without their video part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.chat import ChatProcessor
from learner.supervised.default_model import DefaultModelOptions

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
#: Of a vision tower for pictures, or tiles of one, of 32 × 32 pixels.
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass
class TinyVlm:
    model: Any
    chat: ChatProcessor


def picture(seed: int = 0, height: int = 64, width: int = 64) -> np.ndarray:
    """A random picture, uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def without_video(
    base: Any, image_processor: Any, tokenizer: Any, template: str, video_processor: str, **attributes: Any
) -> Any:
    """A family's processor without its video part, which needs torchvision and which its folders name.

    video_processor: the class of that part; attributes: what the processor's own `__init__` sets.
    """

    from transformers import ProcessorMixin

    class ImagesOnly(base):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str = "") -> None:
            for name, value in attributes.items():
                setattr(self, name, value)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

        apply_chat_template = ProcessorMixin.apply_chat_template
        save_pretrained = ProcessorMixin.save_pretrained

    ImagesOnly.__name__ = base.__name__  # what processor_config.json says
    ImagesOnly.video_processor = video_processor

    return ImagesOnly(image_processor=image_processor, tokenizer=tokenizer, chat_template=template)


def make_tokenizer(special: list[str], *, vocabulary: int = 0, **extra: str) -> Any:
    """A tokenizer that knows `TEXTS`; vocabulary: filled up to so many words, with some that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    roles = ["<|start|>", "<|end|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=roles + special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if vocabulary:
        stated = json.loads(tokenizer.to_str())
        words = stated["model"]["vocab"]
        words |= {f"Ġw{index}": index for index in range(len(words), vocabulary)}
        tokenizer = Tokenizer.from_str(json.dumps(stated))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=roles[0],
        eos_token=roles[1],
        pad_token=roles[2],
        extra_special_tokens=extra or ({"image_token": special[-1]} if special else {}),
        clean_up_tokenization_spaces=False,
    )


def chat_template(image: str) -> str:
    return (
        "{% for message in messages %}<|start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )


def text_sizes(vocabulary: int) -> dict[str, Any]:
    """Of a text model."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # 32 wide, the least that vLLM's CPU build has kernels for
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
    }


def ends(ids: dict[str, int]) -> dict[str, int]:
    return {
        "bos_token_id": ids["<|start|>"],
        "eos_token_id": ids["<|end|>"],
        "pad_token_id": ids["<|pad|>"],
    }


def finish(folder: Path, model_class: Any, config: Any, processor: Any) -> TinyVlm:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_class(config).float().eval()
        for parameter in model.parameters():
            if not parameter.any():  # a family's untrained connector may be zero, and pictures then change nothing
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    save_processor(folder, processor)
    return TinyVlm(model, ChatProcessor.from_parts(str(folder), config, processor))


def save_processor(folder: Path, processor: Any) -> None:
    """Write a processor with the name of its video part, if it was left out."""
    processor.save_pretrained(folder)
    if isinstance(video := getattr(processor, "video_processor", None), str):
        (folder / "video_preprocessor_config.json").write_text(json.dumps({"video_processor_type": video}))
