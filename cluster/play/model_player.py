"""A trained model as the player of `coso play`; it runs in this process, one answer at a time."""

from __future__ import annotations

from typing import Any

from PIL import Image

from cluster.errors import CosoError


class ModelPlayer:
    """Answers observations with a model; greedy if the temperature is 0."""

    def __init__(self, path: str, temperature: float, seed: int, max_new_tokens: int) -> None:
        """path: a model folder or hub name. Raises CosoError if there is no such model."""
        import torch
        from transformers import AutoModelForImageTextToText

        from actors.chat import NotAVisionLanguageModel
        from actors.model_folder import read_model

        try:
            self._chat = read_model(path)
            self._model: Any = AutoModelForImageTextToText.from_pretrained(path).eval()
        except (NotAVisionLanguageModel, OSError, ValueError) as error:
            raise CosoError(str(error)) from error
        torch.manual_seed(seed)
        self._options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": self._chat.eos_token_ids,
            "pad_token_id": self._chat.pad_token_id,
            "suppress_tokens": self._chat.banned_token_ids,
            **(
                {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
            ),
        }

    def answer(self, observation: dict[str, Any]) -> str:
        """The model's utterance for an observation."""
        import torch

        inputs = self._chat.encode_prompt(observation["prompt"], Image.fromarray(observation["image"]))
        with torch.inference_mode():
            ids = self._model.generate(**inputs, **self._options)[0, inputs["input_ids"].shape[1] :]
        return self._chat.decode(ids.tolist())
