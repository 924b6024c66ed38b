"""The default policy: an Idefics3 model of about half a million weights, made on the spot with its own tokenizer.

Small enough to learn and to be served on two CPU cores; of an architecture that vLLM serves on CPU. Everything about
it comes from the texts and pictures it is given and from `DefaultModelOptions`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START, END, PAD = "<|im_start|>", "<end_of_utterance>", "<|pad|>"
IMAGE, IMAGE_EDGE, IMAGE_GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"

#: One turn per message; content is a text or a list of texts and images.
CHAT_TEMPLATE = (
    "{% for message in messages %}" + START + "{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "Assistant:{% endif %}"
)


@dataclass(frozen=True)
class DefaultModelOptions:
    """Sizes of the model."""

    hidden: int  # width of the text layers
    layers: int  # text layers
    image_size: int  # pixels; pictures are scaled to fit
    heads: int = 4  # attention heads, of text and vision
    key_value_heads: int = 2
    vision_hidden: int = 64
    vision_layers: int = 2
    patch_size: int = 8  # pixels
    connector_scale: int = 4  # one image token stands for scale² patches
    vocabulary: int = 1000  # at most; the texts may need fewer
    max_positions: int = 2048  # tokens of prompt and answer

    def __post_init__(self) -> None:
        pixels = self.patch_size * self.connector_scale
        if self.image_size % pixels:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of patch_size × connector_scale ({pixels})"
            )
        if self.hidden % self.heads or self.vision_hidden % self.heads or self.heads % self.key_value_heads:
            raise ValueError(
                f"heads ({self.heads}) must divide hidden ({self.hidden}) and vision_hidden ({self.vision_hidden}), "
                f"and key_value_heads ({self.key_value_heads}) must divide heads"
            )

    @property
    def image_tokens(self) -> int:
        """Tokens a picture takes in a prompt."""
        return (self.image_size // self.patch_size // self.connector_scale) ** 2


def make_default_vlm(
    folder: str | Path,
    texts: Sequence[str],
    images: Sequence[np.ndarray],
    options: DefaultModelOptions,
    seed: int = 0,
) -> None:
    """Write a random model with tokenizer, processor and chat template to `folder`, as `from_pretrained` reads it.

    texts: prompts and answers as they occur, for the tokenizer (any other text can be encoded too, byte by byte);
    images: sample pictures, uint8 (H, W, 3), for the mean and deviation that pixels are normalised with; seed: of the
    weights. The same arguments write the same bytes. Raises `ValueError` where there are no texts or images.
    """
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    if not texts or not images:
        raise ValueError("a default model is made from sample texts and pictures; at least one of each is needed")
    tokenizer = _tokenizer(texts, options.vocabulary)
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in (START, END, PAD, IMAGE)}
    config = Idefics3Config(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": options.hidden,
            "intermediate_size": 2 * options.hidden,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.key_value_heads,
            "max_position_embeddings": options.max_positions,
            "bos_token_id": ids[START],
            "eos_token_id": ids[END],
            "pad_token_id": ids[PAD],
            "tie_word_embeddings": True,
        },
        vision_config={
            "model_type": "idefics3_vision",
            "hidden_size": options.vision_hidden,
            "intermediate_size": 2 * options.vision_hidden,
            "num_hidden_layers": options.vision_layers,
            "num_attention_heads": options.heads,
            "image_size": options.image_size,
            "patch_size": options.patch_size,
        },
        image_token_id=ids[IMAGE],
        pad_token_id=ids[PAD],
        scale_factor=options.connector_scale,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config).float()
    model.generation_config.eos_token_id = ids[END]
    model.generation_config.pad_token_id = ids[PAD]
    model.save_pretrained(folder)
    _processor(tokenizer, images, options).save_pretrained(folder)


def _tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that every text has an encoding and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [START, END, PAD, IMAGE, IMAGE_EDGE, IMAGE_GLOBAL]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={
            "image_token": IMAGE,
            "fake_image_token": IMAGE_EDGE,
            "global_image_token": IMAGE_GLOBAL,
            "end_of_utterance_token": END,
        },
        clean_up_tokenization_spaces=False,
    )


def _processor(tokenizer: PreTrainedTokenizerFast, images: Sequence[np.ndarray], options: DefaultModelOptions) -> Any:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    # One mean and deviation for all channels: pictures of black text on white would else divide by nearly nothing.
    pixels = np.concatenate([np.asarray(image, np.float32).ravel() for image in images]) / 255
    # The mean lies between two values of a pixel: engines take a picture whose normalised pixels are all 0 for padding.
    mean, deviation = (math.floor(float(pixels.mean()) * 255) + 0.5) / 255, max(float(pixels.std()), 0.05)
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": options.image_size},
        max_image_size={"longest_edge": options.image_size},
        do_image_splitting=False,
        do_resize=True,
        image_mean=[mean] * 3,
        image_std=[round(deviation, 4)] * 3,
    )
    return Idefics3Processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_seq_len=options.image_tokens,
        chat_template=CHAT_TEMPLATE,
    )
