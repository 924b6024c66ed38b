"""Chat prompts, image tokens, the end of an answer and its action part, as a model's own processor defines them.

Everything that depends on a tokenizer comes from the one in use; no token id is written in this project. The policy
server uses this module to send prompts to the engine, and the learner to run the same ids again.
"""

from __future__ import annotations

import re
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

#: The JSON key that opens the action part of an utterance, as the environments' prompts ask for it.
ACTION_KEY = re.compile(r'"action"\s*:')


class NotAVisionLanguageModel(ValueError):
    """The named path holds no Hugging Face vision-language model that this project can use."""


class ChatProcessor:
    """A model's processor: turns chat prompts into token ids, and answers into text, action part and end tokens."""

    def __init__(self, path: str) -> None:
        """path: a folder or hub name of a Hugging Face VLM. Raises `NotAVisionLanguageModel`."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoProcessor, GenerationConfig

        try:
            config = AutoConfig.from_pretrained(path)
            processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
            raise NotAVisionLanguageModel(
                f"model.path {path!r} cannot be loaded as a vision-language model: {_first_line(error)}. "
                "Name a folder with config.json, weights, tokenizer and processor files, or a hub model."
            ) from error
        try:
            generation = GenerationConfig.from_pretrained(path)
        except OSError:  # the model states no generation settings, which it need not
            generation = GenerationConfig()
        self._take(path, config, processor, generation.eos_token_id)

    @classmethod
    def from_parts(
        cls, path: str, config: Any, processor: Any, eos_token_id: int | list[int] | None = None
    ) -> ChatProcessor:
        """From a model config and a processor in memory; eos_token_id: the generation config's, if there is one."""
        chat = cls.__new__(cls)
        chat._take(path, config, processor, eos_token_id)
        return chat

    def _take(self, path: str, config: Any, processor: Any, eos_token_id: int | list[int] | None) -> None:
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise NotAVisionLanguageModel(
                f"model.path {path!r} has no image processor: it is a text model ({config.model_type}). "
                "Name a vision-language model."
            )
        if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
            raise NotAVisionLanguageModel(
                f"model.path {path!r} has no chat template, so it is unknown how to write a prompt for it. "
                "Add chat_template.jinja to the model's folder."
            )
        self.path = path
        self.config = config
        self.processor: Any = processor
        self.tokenizer: Any = processor.tokenizer
        self._generation_eos = eos_token_id

    def prompt_text(self, prompt: str) -> str:
        """The chat-templated text of one user turn: the image first, then the environment's prompt."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text.removeprefix(self.tokenizer.bos_token) if self._start_comes_twice else text

    @cached_property
    def _start_comes_twice(self) -> bool:
        """Whether a start token written by the chat template would be followed by the tokenizer's own."""
        start = self.tokenizer.bos_token
        return start is not None and self.tokenizer(start)["input_ids"].count(self.tokenizer.bos_token_id) > 1

    def encode_prompt(self, prompt: str, image: Image.Image) -> dict[str, Any]:
        """Everything the model's forward pass needs for one prompt, batch dimension of 1: `input_ids` int64 (1, P)
        with image tokens expanded, `attention_mask`, and the image tensors of this model family."""
        return dict(self.processor(text=[self.prompt_text(prompt)], images=[[image]], return_tensors="pt"))

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of a response, special tokens left out."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

    def token_texts(self, ids: np.ndarray | list[int]) -> list[str]:
        """The text that each token adds; joined, they are the response's text with its special tokens.

        A character made of several tokens belongs to the last of them. Bytes that form no character show as U+FFFD.
        """
        text = self._decode_raw(ids)
        ends = [0]
        for count in range(1, len(ids)):
            # A prefix can end within a character, and then decodes to U+FFFD: count only what agrees with the text.
            ends.append(max(ends[-1], _common_prefix(self._decode_raw(ids[:count]), text, ends[-1])))
        ends.append(len(text))
        return [text[start:end] for start, end in pairwise(ends)] if len(ids) else []

    def action_start(self, ids: np.ndarray | list[int]) -> int:
        """Index of the token in which the last `"action":` begins, found by character offsets; len(ids) if none.

        Tokens before it are thoughts, the rest is the action part (RL4VLM, arXiv 2405.10292).
        """
        matches = list(ACTION_KEY.finditer(self._decode_raw(ids)))
        if not matches:
            return len(ids)
        character = matches[-1].start()
        # The first prefix whose text reaches past that character ends with the token that holds it. Texts of prefixes
        # grow monotonically (U+FFFD of an unfinished character left out), so bisect instead of decoding all of them.
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            if len(self._decode_raw(ids[: middle + 1]).rstrip("\ufffd")) > character:
                high = middle
            else:
                low = middle + 1
        return low

    def _decode_raw(self, ids: np.ndarray | list[int]) -> str:
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """Ids that end an answer: the generation config's, else the tokenizer's."""
        ids = self._generation_eos if self._generation_eos is not None else self.tokenizer.eos_token_id
        return sorted(ids) if isinstance(ids, list) else [ids]

    @cached_property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eos_token_ids[0] if pad is None else pad

    @cached_property
    def banned_token_ids(self) -> list[int]:
        """Ids that an answer must not contain: every special token except the end tokens. Above all image placeholders:
        a sampled image token stands for no image, and the learner's forward pass would fail on it."""
        # `image_token_id`, `image_token_index`, `video_token_id`, `vision_start_token_id`, `boi_token_index`, …
        named = {
            value
            for name, value in vars(self.config).items()
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
        }
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special} | set(
            self.tokenizer.all_special_ids
        )
        return sorted((special | named) - set(self.eos_token_ids))


def _common_prefix(left: str, right: str, known: int) -> int:
    """Length of the longest common prefix; the first `known` characters are known to agree."""
    shorter = min(len(left), len(right))
    return next((index for index in range(known, shorter) if left[index] != right[index]), shorter)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
