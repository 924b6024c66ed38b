"""Trajectories of a tiny model: real prompts through its own processor, random answers with an action part."""

from __future__ import annotations

import numpy as np

from actors.chat import ChatProcessor
from actors.images import PngEncoder
from actors.trajectory import END_ENVIRONMENT_DIED, TrajectoryBatch
from tests.tiny_models import PROMPT, TEXTS, picture


def sample_trajectories(chat: ChatProcessor, steps: int, seed: int = 0, version: int = 0) -> TrajectoryBatch:
    """Episodes of up to 5 steps that terminate, are cut off with a final observation, or lose their environment, in
    turn. Answers are a text of 5 to 40 tokens; behaviour log-probabilities are about those of a uniform policy."""
    rng = np.random.default_rng(seed)
    encoder = PngEncoder()
    images: dict[str, bytes] = {}
    pictures = [picture(number) for number in range(6)]

    def show() -> str:
        from PIL import Image

        image = pictures[rng.integers(len(pictures))]
        key, images_png = encoder.encode(image)
        images[key] = images_png
        ids_of.setdefault(key, chat.encode_prompt(PROMPT, Image.fromarray(image))["input_ids"][0].tolist())
        return key

    ids_of: dict[str, list[int]] = {}
    vocabulary = len(chat.tokenizer)
    rows = []
    for index in range(steps):
        last = index % 5 == 4 or index == steps - 1
        ending = ("terminated", "truncated", END_ENVIRONMENT_DIED)[index // 5 % 3] if last else ""
        response = chat.tokenizer.encode(TEXTS[1 + index % 2], add_special_tokens=False)[-int(rng.integers(5, 40)) :]
        response = [*response, chat.eos_token_ids[0]]
        key = show()
        row = {
            "run": "test",
            "episode": f"e{index // 5}",
            "environment": "test",
            "worker": 0,
            "slot": 0,
            "step": index % 5,
            "seed": 1,
            "prompt": PROMPT,
            "image": key,
            "prompt_ids": ids_of[key],
            "response_ids": response,
            "behaviour_logprobs": (-np.log(vocabulary) + rng.normal(0, 0.1, len(response))).tolist(),
            "policy_versions": [{"version": version, "start": 0}],
            "finish_reason": "stop",
            "utterance": chat.decode(response),
            "action": "+",
            "action_labels": [1],
            "valid": True,
            "reward": float(rng.normal()),
            "terminated": ending == "terminated",
            "truncated": ending == "truncated",
            "success": False,
            "end_reason": ending,
            "influence": rng.random(len(response)).tolist(),
        }
        if ending == "truncated":
            final = show()
            row |= {"final_prompt": PROMPT, "final_image": final, "final_prompt_ids": ids_of[final]}
        rows.append(row)
    return TrajectoryBatch.from_rows(rows, images)
