"""Chat prompts, image tokens, the end of an answer and its action part, as a model's own processor defines them.

Everything that depends on a tokenizer comes from the one in use; no token id is written in this project. The policy
server uses this module to send prompts to the engine, and the learner to run the same ids again.

A prompt's text is data. The chat template is rendered once, around a mark, and tokenised; the ids of the text then take
the mark's place. So only the template can write special tokens, whatever the text says, and nothing but the model's
folder decides how a prompt begins and ends: not the text, and not the date.
"""

from __future__ import annotations

import copy
import json
import re
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.chat_template import NotAVisionLanguageModel, chance, chat_template
from envs.parsing import without_surrogates

if TYPE_CHECKING:
    from PIL import Image
    from tokenizers import Tokenizer

#: The JSON key that opens the action part of an utterance, as the environments' prompts ask for it.
ACTION_KEY = re.compile(r'"action"\s*:')


#: Stands for the environment's text while the chat template is rendered and tokenised.
TEXT_MARK = "<|coso text of the environment|>"

#: "Today" for chat templates that write the date. It never changes: the learner, and a run that is resumed next year,
#: must get the prompt that the engine saw.
TEMPLATE_DATE = datetime(2025, 1, 1)

#: By `model_type`: what a per-token input of the forward pass is at an answer's tokens, if not 0. PaliGemma's 0 marks
#: the prefix, whose tokens see each other both ways: an answer marked so would see its own future.
ANSWER_KINDS = {"paligemma": {"token_type_ids": 1}}


class ChatProcessor:
    """A model's processor: turns chat prompts into token ids, and answers into text, action part and end tokens.

    Engine and learner both use it. It checks what they need of tokenizer, template and processor;
    `actors.model_folder.read_model` also looks at the weights' files and at what the engine can serve.
    """

    def __init__(self, path: str) -> None:
        """path: a folder or hub name of a Hugging Face VLM. Raises `NotAVisionLanguageModel`."""
        from transformers import AutoConfig, AutoProcessor, GenerationConfig

        try:
            # A model folder is data. Without the argument, a terminal is asked whether to run the folder's code.
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
            try:
                generation = GenerationConfig.from_pretrained(path)
            except OSError:
                if (Path(path) / "generation_config.json").exists():
                    raise
                generation = GenerationConfig()  # the model states no generation settings, which it need not
        except ImportError as error:
            raise NotAVisionLanguageModel(
                f"model.path {path!r} cannot be loaded as a vision-language model here: "
                f"{_first_line(error).partition('. ')[0]}. Install that, or name a model that needs none."
            ) from error
        except Exception as error:  # files of others make the libraries raise anything
            raise NotAVisionLanguageModel(
                f"model.path {path!r} cannot be loaded as a vision-language model: {_first_line(error)}. "
                "Name a folder with config.json, weights, tokenizer and processor files, or a hub model."
            ) from error
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
        self.path = path
        self.config = config
        self.processor: Any = processor
        self.tokenizer: Any = processor.tokenizer
        self._template = chat_template(path, processor)
        ends = self.tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        #: Ids that end an answer: the generation config's, else the tokenizer's.
        self.eos_token_ids: list[int] = ends if isinstance(ends, list) else [ends]
        self._check_tokens()
        self.eos_token_ids = sorted(self.eos_token_ids)
        self._marked_processor: Any = copy.deepcopy(processor)
        self._add_mark()
        self._check_template()

    def _check_tokens(self) -> None:
        if not self.eos_token_ids or not all(isinstance(token, int) for token in self.eos_token_ids):
            raise NotAVisionLanguageModel(
                f"model.path {self.path!r} has no end token, so its answers would never end. Set eos_token_id in "
                "generation_config.json, or eos_token in tokenizer_config.json."
            )
        if not self.tokenizer.is_fast:
            raise NotAVisionLanguageModel(
                f"model.path {self.path!r} has no fast tokenizer. Save its tokenizer with transformers, so that the "
                "folder has a tokenizer.json."
            )
        embeddings = self.config.get_text_config().vocab_size
        largest, token = max((index, token) for token, index in self.tokenizer.get_vocab().items())
        if max(largest, *self.eos_token_ids) >= embeddings:
            raise NotAVisionLanguageModel(
                f"model.path {self.path!r} has {embeddings} embeddings (vocab_size in config.json), too few for its "
                f"tokens: {token!r} has id {largest}, and its answers end with {self.eos_token_ids}. After adding "
                "tokens call model.resize_token_embeddings(len(tokenizer)), and save both."
            )

    def _add_mark(self) -> None:
        from tokenizers import AddedToken

        self._marked_processor.tokenizer.add_tokens([AddedToken(TEXT_MARK, special=True, normalized=False)])

    def _check_template(self) -> None:
        """Turn a prompt and a grey image into ids, once, to see that template and processor fit together."""
        from PIL import Image

        try:
            count = self._skeleton.count(TEXT_MARK)
            if count != 1:
                raise ValueError(f"the template writes a message's text {count} times, not once")
            if random := chance(self._template):
                raise ValueError(f"the template uses {random}, so that it writes another prompt each time")
            ids = self.encode_prompt("", Image.new("RGB", (224, 224), (128, 128, 128)))["input_ids"][0].tolist()
        except Exception as error:  # a template and a processor are code of others and may raise anything
            raise NotAVisionLanguageModel(
                f"model.path {self.path!r}: its chat template and processor make no prompt of one image and a text: "
                f"{_first_line(error)}. Look at chat_template.jinja: it must write content of the types image and text."
            ) from error
        if self.image_token_id is not None and self.image_token_id not in ids:
            raise NotAVisionLanguageModel(
                f"model.path {self.path!r}: token {self.image_token_id} stands for images (image_token_id or "
                "image_token_index in config.json), but the processor's prompts do not have it. In the tokenizer it is "
                f"{self.tokenizer.convert_ids_to_tokens(self.image_token_id)!r}. Save tokenizer, processor and config "
                "of the same model."
            )

    @cached_property
    def _skeleton(self) -> str:
        """One user turn as the chat template writes it, the image first, then `TEXT_MARK` for the text."""
        content = [{"type": "image"}, {"type": "text", "text": TEXT_MARK}]
        date = {"strftime_now": TEMPLATE_DATE.strftime} if "strftime_now" in self._template else {}
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            add_generation_prompt=True,
            tokenize=False,
            **date,
        )
        return text.removeprefix(self.tokenizer.bos_token) if self._start_comes_twice else text

    @cached_property
    def _start_comes_twice(self) -> bool:
        """Whether a start token written by the chat template would be followed by the tokenizer's own."""
        start = self.tokenizer.bos_token
        return start is not None and self.tokenizer(start)["input_ids"].count(self.tokenizer.bos_token_id) > 1

    @cached_property
    def _parts(self) -> tuple[list[int], list[int]]:
        """Ids before and after the text, the image's tokens not expanded."""
        ids = self._marked_processor.tokenizer(self._skeleton)["input_ids"]
        position = ids.index(self._mark_id)
        return ids[:position], ids[position + 1 :]

    @cached_property
    def _mark_id(self) -> int:
        return int(self._marked_processor.tokenizer.convert_tokens_to_ids(TEXT_MARK))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of one user turn, as vLLM takes them: the image (its tokens not expanded), the environment's prompt, and
        the start of an answer."""
        before, after = self._parts
        return [*before, *self.text_ids(prompt), *after]

    def encode_prompt(self, prompt: str, image: Image.Image) -> dict[str, Any]:
        """Everything the model's forward pass needs for one prompt, batch dimension of 1: `input_ids` int64 (1, P)
        with image tokens expanded, `attention_mask`, and the image tensors of this model family."""
        inputs = self.encode_image(image)
        return inputs | self.with_text(inputs, prompt)

    def encode_image(self, image: Image.Image) -> dict[str, Any]:
        """What `encode_prompt` returns, with one mark in place of the text: its part that takes time, and the same for
        every prompt about this image."""
        inputs = dict(self._marked_processor(text=[self._skeleton], images=[[image]], return_tensors="pt"))
        inputs.pop("labels", None)  # PaliGemma's processor adds them: they are no input of a forward pass
        return inputs

    def twin(self) -> ChatProcessor:
        """One whose `encode_image` another thread may use at the same time: tokenizers are not for two at once."""
        twin = copy.copy(self)
        twin._marked_processor = copy.deepcopy(self._marked_processor)
        return twin

    def with_text(self, inputs: dict[str, Any], prompt: str) -> dict[str, Any]:
        """Those of `encode_image`'s tensors that have one number per token, with the prompt's text in its place."""
        import torch

        marked = inputs["input_ids"]
        position = marked[0].tolist().index(self._mark_id)
        text = torch.tensor([self.text_ids(prompt)], dtype=marked.dtype)
        whole = {}
        for name, tensor in inputs.items():
            # Input ids, attention mask and token kinds: what has one number per token.
            if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point() and tensor.shape == marked.shape:
                same_kind = tensor[:, position : position + 1].expand(-1, text.shape[1])
                middle = text if name == "input_ids" else same_kind
                whole[name] = torch.cat([tensor[:, :position], middle, tensor[:, position + 1 :]], dim=1)
        return whole

    @property
    def answer_kinds(self) -> dict[str, int]:
        """Values of the per-token inputs (`token_type_ids`, …) at an answer's tokens; 0 where not named."""
        return ANSWER_KINDS.get(self.config.model_type, {})

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text as nothing but text: `<image>` or an end token's name in it becomes several ordinary tokens.

        Halves of surrogate pairs become U+FFFD. Raises ValueError for a character that is itself a special token.
        """
        ids: list[int] = []
        rest = [without_surrogates(text)]
        while rest:
            piece = rest.pop()
            encoding = self._text_tokenizer.encode(piece, add_special_tokens=False)
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            special = next((span for index, span in spans if index in self._special_ids), None)
            if special is None:
                ids += encoding.ids
                continue
            # The vocabulary has a special token as a word too. Cut it, and no token reaches over the cut.
            if special[1] - special[0] < 2:
                raise ValueError(
                    f"the tokenizer of {self.path!r} knows {piece[slice(*special)]!r} only as special token"
                )
            rest += [piece[special[0] + 1 :], piece[: special[0] + 1]]
        return ids

    @cached_property
    def _text_tokenizer(self) -> Tokenizer:
        """The tokenizer, but special tokens are not recognised, and no space is added in front (a text is never the
        beginning of a prompt)."""
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for added in state["added_tokens"]:
            added["special"] = added["id"] in self._special_ids or added["special"]
        for stage in ("normalizer", "pre_tokenizer"):
            state[stage] = _without_prefix_space(state[stage])
        tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Ids that no text may become. Not among them: a token for unknown characters, and an ordinary word that a
        config names, for instance for padding."""
        named = {*self.banned_token_ids, *self.eos_token_ids} & self.tokenizer.added_tokens_decoder.keys()
        return frozenset(named | self._tokenizers_special_ids) - {self.tokenizer.unk_token_id}

    @cached_property
    def _tokenizers_special_ids(self) -> set[int]:
        """What the tokenizer itself calls special."""
        added = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return added | set(self.tokenizer.all_special_ids)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of a response, special tokens left out."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True, clean_up_tokenization_spaces=False)

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

    def action_start(self, ids: np.ndarray | list[int], character: int | None = None) -> int:
        """Index of the token in which an answer's action part begins; len(ids) if it has none.

        Tokens before it are thoughts, the rest is the action part (RL4VLM, arXiv 2405.10292). character: where it
        begins in the answer's text, as the environment's parser says (the column `action_start` of a trajectory). None:
        the parser does not say, and the part begins at the last `"action":`.
        """
        if character is None:
            matches = list(ACTION_KEY.finditer(self._decode_raw(ids)))
            if not matches:
                return len(ids)
            character = matches[-1].start()
        elif character >= len(self.decode(ids)):
            return len(ids)
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

    @property
    def image_token_id(self) -> int | None:
        """The token that stands for an image, or a part of one, in a prompt; None where the config names none."""
        named = (getattr(self.config, name, None) for name in ("image_token_id", "image_token_index"))
        return next((index for index in named if isinstance(index, int)), None)

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
        return sorted((self._tokenizers_special_ids | named) - set(self.eos_token_ids))


def _without_prefix_space(stage: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer, as tokenizer.json states it, without what puts a space in front of a text."""
    if stage is None or stage["type"] == "Prepend":
        return None
    changed = dict(stage)
    for parts in ("normalizers", "pretokenizers"):
        if parts in changed:
            changed[parts] = [kept for part in changed[parts] if (kept := _without_prefix_space(part)) is not None]
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    return changed


def _common_prefix(left: str, right: str, known: int) -> int:
    """Length of the longest common prefix; the first `known` characters are known to agree."""
    shorter = min(len(left), len(right))
    return next((index for index in range(known, shorter) if left[index] != right[index]), shorter)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
