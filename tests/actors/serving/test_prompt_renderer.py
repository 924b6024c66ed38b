"""What is refused before vLLM sees it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from actors.chat import ChatProcessor
from actors.generation import GenerationRequest, Refusal
from actors.images import PngEncoder
from actors.serving.prompt_renderer import PromptRenderer
from tests.tiny_models import make_qwen2_5_vl, picture


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatProcessor:
    return make_qwen2_5_vl(tmp_path_factory.mktemp("qwen")).chat


def refusal(chat: ChatProcessor, prompt: str, image: np.ndarray, max_model_len: int = 256) -> Any:
    renderer = PromptRenderer(chat, None, max_model_len)  # type: ignore[arg-type]  # there is no engine to ask
    key, png = PngEncoder().encode(image)
    return asyncio.run(renderer.render(GenerationRequest(prompt, key, png, 1.0, 8)))


def test_an_image_of_300_to_1_is_refused_with_the_processors_words(chat: ChatProcessor) -> None:
    refused = refusal(chat, "Go.", picture(0, 10, 3000))
    assert isinstance(refused, Refusal) and refused.reason == "image_refused" and "aspect ratio" in refused.detail


def test_a_prompt_of_400_words_is_too_long(chat: ChatProcessor) -> None:
    refused = refusal(chat, "word " * 400, picture())
    length = chat.encode_prompt("word " * 400, _image())["input_ids"].shape[1]
    assert refused == Refusal(
        "prompt_too_long",
        f"the prompt has {length} tokens, which leaves none for an answer: policy_server.max_model_len is 256",
    )


def test_a_prompt_needs_room_for_one_token_of_an_answer(chat: ChatProcessor) -> None:
    length = chat.encode_prompt("Go.", _image())["input_ids"].shape[1]
    assert refusal(chat, "Go.", picture(), length).reason == "prompt_too_long"


def _image() -> Any:
    from PIL import Image

    return Image.fromarray(picture())
