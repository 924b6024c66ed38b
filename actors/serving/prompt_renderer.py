"""From a request to the input of vLLM's engine, or the reason why neither engine nor learner can take it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from actors.chat import ChatProcessor
from actors.generation import GenerationRequest, Refusal
from actors.images import decode_png
from actors.serving.policy_engine import ModelNotServable

if TYPE_CHECKING:
    from PIL import Image
    from vllm.v1.engine.async_llm import AsyncLLM

#: Decoded images in the cache; the oldest is dropped first.
CACHED_IMAGES = 64


class PromptRenderer:
    """Tokenises prompts and processes images, and refuses what cannot be answered or trained on."""

    def __init__(self, chat: ChatProcessor, engine: AsyncLLM, max_model_len: int) -> None:
        """max_model_len: longest prompt plus answer, tokens."""
        self._chat = chat
        self._engine = engine
        self._max_model_len = max_model_len
        self._verified_lengths: set[int] = set()
        self._image_tokens: dict[tuple[int, int], int] = {}
        self._images: dict[str, Image.Image] = {}

    async def render(self, request: GenerationRequest) -> Any | Refusal:
        """The request as an input of vLLM's engine. Raises `ModelNotServable` where engine and learner would see
        different prompts."""
        parts = await self.parts(request)
        if isinstance(parts, Refusal):
            return parts
        ids, image = parts
        from vllm.exceptions import VLLMClientError
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        prompt = {
            "prompt_token_ids": ids,
            "multi_modal_data": {"image": [image]},
            # vLLM caches processed images by this hash of their content.
            "multi_modal_uuids": {"image": [request.image]},
        }
        try:
            parsed = parse_model_prompt(self._engine.model_config, prompt)
            (engine_input,) = await self._engine.renderer.render_cmpl_async([parsed])
        except (VLLMClientError, ValueError) as error:
            return Refusal("request_refused", f"vLLM refuses the prompt: {error}")
        self._verify(request, image, engine_input["prompt_token_ids"])
        return engine_input

    async def parts(self, request: GenerationRequest) -> tuple[list[int], Image.Image] | Refusal:
        """(ids of the prompt, its image not expanded; the image), or why the learner cannot take them."""
        try:
            ids = self._chat.prompt_ids(request.prompt)
        except ValueError as error:
            return Refusal("request_refused", str(error))
        try:
            image = await self._decoded(request)
            length = len(ids) + self._tokens_of_image(image)
        except Exception as error:  # PIL and the model's processor are code of others, and have no common error
            return Refusal("image_refused", f"the model's processor refuses the image: {error}")
        # Before vLLM sees the request: it would keep the image for a request that never comes, and later ones with the
        # same image would fail.
        if length >= self._max_model_len:
            return Refusal(
                "prompt_too_long",
                f"the prompt has {length} tokens, which leaves none for an answer: policy_server.max_model_len is "
                f"{self._max_model_len}",
            )
        return ids, image

    async def _decoded(self, request: GenerationRequest) -> Image.Image:
        """The request's image, cached by its content hash: an unchanged screen is decoded once."""
        image = self._images.get(request.image)
        if image is None:
            image = await asyncio.to_thread(decode_png, request.png)
            self._images[request.image] = image
            if len(self._images) > CACHED_IMAGES:
                self._images.pop(next(iter(self._images)))
        return image

    def _tokens_of_image(self, image: Image.Image) -> int:
        """Tokens by which a prompt grows when its image is expanded; in every family they depend on its size only.
        Raises what the model's processor raises for an image that it does not take."""
        if image.size not in self._image_tokens:
            expanded = self._chat.encode_prompt("", image)["input_ids"].shape[1]
            self._image_tokens[image.size] = expanded - len(self._chat.prompt_ids(""))
        return self._image_tokens[image.size]

    def _verify(self, request: GenerationRequest, image: Image.Image, engine_ids: list[int]) -> None:
        """Check that the engine sees the same ids as the model's own processor makes, which the learner will run.

        Once for each length of prompt: it differs with the text and with the number of image tokens.
        """
        if len(engine_ids) in self._verified_lengths:
            return
        expected = self._chat.encode_prompt(request.prompt, image)["input_ids"][0].tolist()
        if list(engine_ids) != expected:
            raise ModelNotServable(
                f"vLLM and the processor of {self._chat.path!r} turn a prompt into different tokens "
                f"({len(engine_ids)} and {len(expected)} of them), so the learner cannot train on vLLM's answers. "
                "Use a model for which vLLM's tokens equal those of the processor."
            )
        self._verified_lengths.add(len(engine_ids))
