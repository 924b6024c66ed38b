"""Steps to train on where no environment runs: random pictures and answers, through the model's own processor."""

from __future__ import annotations

import numpy as np

from actors.chat import ChatProcessor
from actors.images import decode_png, encode_png, image_hash
from actors.trajectory import TrajectoryBatch

PROMPT = "The picture shows a screen. Say what you see, then which action you take."


def made_picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Random squares of 16 pixels, uint8 (height, width, 3): a PNG of noise would take a second to write."""
    squares = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return squares.repeat(16, 0).repeat(16, 1)[:height, :width]


def made_steps(
    chat: ChatProcessor, count: int, *, height: int, width: int, answer_tokens: int, seed: int = 0
) -> TrajectoryBatch:
    """Episodes of up to five steps. Every step has a picture of its own, uint8 (height, width, 3), and an answer of
    `answer_tokens` random ids; its behaviour log-probabilities are those of a uniform policy."""
    rng = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(len(chat.tokenizer)), list(chat.banned_token_ids))
    rows, images = [], {}
    prompt_ids: list[int] = []  # the same for all pictures of one size
    for index in range(count):
        picture = made_picture(rng, height, width)
        key, png = image_hash(picture), encode_png(picture)
        images[key] = png
        prompt_ids = prompt_ids or chat.encode_prompt(PROMPT, decode_png(png))["input_ids"][0].tolist()
        last = index % 5 == 4 or index == count - 1
        rows.append(
            {
                "run": "benchmark",
                "episode": f"e{index // 5}",
                "environment": "benchmark",
                "step": index % 5,
                "seed": 1,
                "prompt": PROMPT,
                "image": key,
                "prompt_ids": prompt_ids,
                "response_ids": rng.choice(allowed, answer_tokens).tolist(),
                "behaviour_logprobs": [-float(np.log(len(allowed)))] * answer_tokens,
                "policy_versions": [{"version": 0, "start": 0}],
                "finish_reason": "length",
                "utterance": "",
                "action": "+",
                "action_labels": [1],
                "valid": True,
                "reward": float(rng.normal()),
                "terminated": last,
                "truncated": False,
                "success": False,
                "end_reason": "terminated" if last else "",
                "influence": rng.random(answer_tokens).tolist(),
            }
        )
    return TrajectoryBatch.from_rows(rows, images)
