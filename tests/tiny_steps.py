"""Rows of a rollout for tests of what comes after one."""

from __future__ import annotations

from typing import Any

import numpy as np

from actors.chat import ChatProcessor
from actors.images import PngEncoder, decode_png
from actors.trajectory import TrajectoryBatch


def step_rows(
    chat: ChatProcessor, prompts: list[str], pictures: list[np.ndarray], responses: list[list[int]]
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """One row per (prompt, picture, response), each an episode of one step, with the ids the processor makes of it."""
    encoder = PngEncoder()
    rows, images = [], {}
    for number, (prompt, picture, response) in enumerate(zip(prompts, pictures, responses, strict=True)):
        key, png = encoder.encode(picture)
        images[key] = png
        generator = np.random.default_rng(number)
        rows.append(
            {
                "episode": f"episode-{number}",
                "step": 0,
                "prompt": prompt,
                "image": key,
                "prompt_ids": chat.encode_prompt(prompt, decode_png(png))["input_ids"][0].tolist(),
                "response_ids": response,
                "behaviour_logprobs": (-generator.random(len(response))).tolist(),
                "influence": generator.random(len(response)).tolist(),
                "reward": 0.0,
                "terminated": False,
            }
        )
    return rows, images


def steps(
    chat: ChatProcessor, prompts: list[str], pictures: list[np.ndarray], responses: list[list[int]]
) -> TrajectoryBatch:
    return TrajectoryBatch.from_rows(*step_rows(chat, prompts, pictures, responses))
