"""From trajectories to the tensors of one forward pass: right padded, nothing cut, nothing tokenised again.

The model's own processor is asked about (prompt, image) only: it gives the image tensors of its family and must give
exactly the prompt ids that the engine saw. Response ids are those that were sampled.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from actors.chat import ChatProcessor
from actors.images import decode_png
from actors.trajectory import TrajectoryBatch
from learner.algorithms.base import Targets

#: Answers whose action parts a `BatchBuilder` remembers; of a thousand tokens each, they take up 128 MiB.
ACTION_STARTS = 16384


class PromptMismatch(ValueError):
    """The processor gives other prompt ids than those the engine saw: not the model that made the trajectory."""


@dataclass
class TokenBatch:
    """B steps as tensors; L = longest prompt + response, R = longest response of the batch, padding on the right."""

    #: What the model's forward takes: `input_ids` int64 (B, L), `attention_mask` int64 (B, L), the family's own
    #: per-token inputs (B, L) and image tensors.
    model_inputs: dict[str, Tensor]
    prompt_lengths: Tensor  # int64 (B,), tokens, image tokens included
    response_lengths: Tensor  # int64 (B,)
    response_ids: Tensor  # int64 (B, R), 0 where padded
    response_mask: Tensor  # bool (B, R), True on response tokens
    action_mask: Tensor  # bool (B, R), True on the action part, see `ChatProcessor.action_start`
    behaviour_logprobs: Tensor  # float32 (B, R), nats, of the distribution sampled from; 0 where padded or none
    influence: Tensor  # float32 (B, R) in [0, 1]; 0 where padded or not scored
    sample_weight: Tensor  # float32 (B,), 0 for a sample that only fills up a micro-batch
    #: Columns of `learner.algorithms.base.Targets`: float32, (B,) per step and (B, R) per token, 0 where padded.
    targets: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`."""
        moved = {
            each.name: value.to(device)
            for each in fields(self)
            if isinstance(value := getattr(self, each.name), Tensor)
        }
        inputs = {name: tensor.to(device) for name, tensor in self.model_inputs.items()}
        targets = {name: tensor.to(device) for name, tensor in self.targets.items()}
        return replace(self, model_inputs=inputs, targets=targets, **moved)


class BatchBuilder:
    """Builds `TokenBatch`es, remembering what the processor made of recent (prompt, image) pairs."""

    def __init__(self, chat: ChatProcessor, cache_bytes: int = 256 << 20) -> None:
        """cache_bytes: bound on the remembered tensors (least recently used go first)."""
        self._chat = chat
        self._capacity = cache_bytes
        self._size = 0
        self._encoded: OrderedDict[tuple[str, str], dict[str, Tensor]] = OrderedDict()
        # Every pass over a batch asks again, and each time the tokenizer would decode the answer several times.
        self._action_start = lru_cache(maxsize=ACTION_STARTS)(
            lambda ids, start: chat.action_start(np.frombuffer(ids, np.int64), start)
        )

    def build(self, trajectories: TrajectoryBatch, indices: Sequence[int] | np.ndarray) -> TokenBatch:
        """The steps of the given row numbers. Raises `PromptMismatch`, and `KeyError` for an image that is missing."""
        steps = _rows(
            trajectories,
            indices,
            "prompt",
            "image",
            "prompt_ids",
            "response_ids",
            "action_start",
            "behaviour_logprobs",
            "influence",
        )
        prompts = [self._encode(trajectories, row["prompt"], row["image"], row["prompt_ids"]) for row in steps]
        responses = [np.asarray(row["response_ids"], np.int64) for row in steps]
        action_masks = []
        for row, ids in zip(steps, responses, strict=True):
            mask = np.zeros(len(ids), bool)
            mask[self._action_start(ids.tobytes(), row["action_start"]) :] = True
            action_masks.append(mask)
        return _assemble(
            prompts,
            responses,
            action_masks,
            [_floats(row["behaviour_logprobs"], len(row["response_ids"])) for row in steps],
            [_floats(row["influence"], len(row["response_ids"])) for row in steps],
            self._chat.answer_kinds,
        )

    def build_final(self, trajectories: TrajectoryBatch, indices: Sequence[int] | np.ndarray) -> TokenBatch:
        """The observations after the last step of cut-off episodes (R = 0), for the values they still had ahead.

        Raises `ValueError` for a row that has no final observation.
        """
        steps = _rows(trajectories, indices, "final_prompt", "final_image", "final_prompt_ids")
        for index, row in zip(indices, steps, strict=True):
            if row["final_image"] is None:
                raise ValueError(f"step {index} of the batch has no final observation to take a value of")
        prompts = [
            self._encode(trajectories, row["final_prompt"], row["final_image"], row["final_prompt_ids"])
            for row in steps
        ]
        nothing = [np.empty(0, np.int64) for _ in steps]
        return _assemble(prompts, nothing, nothing, nothing, nothing, self._chat.answer_kinds)

    def _encode(
        self, trajectories: TrajectoryBatch, prompt: str, image: str, expected_ids: list[int] | None
    ) -> dict[str, Tensor]:
        key = (prompt, image)
        encoded = self._encoded.get(key)
        if encoded is None:
            raw = self._chat.encode_prompt(prompt, decode_png(trajectories.images[image]))
            encoded = {name: value for name, value in raw.items() if isinstance(value, Tensor)}
            self._encoded[key] = encoded
            self._size += _nbytes(encoded)
            while self._size > self._capacity and len(self._encoded) > 1:
                _, dropped = self._encoded.popitem(last=False)
                self._size -= _nbytes(dropped)
        else:
            self._encoded.move_to_end(key)
        if expected_ids is not None:
            ids = encoded["input_ids"][0].tolist()
            if ids != expected_ids:
                raise PromptMismatch(
                    f"the processor of {self._chat.path!r} makes {len(ids)} prompt tokens where the engine saw "
                    f"{len(expected_ids)} (first difference at token {_first_difference(ids, expected_ids)}). "
                    "Engine and learner must be given the same model folder and the same chat template."
                )
        return encoded


def target_columns(targets: Targets, rows: np.ndarray, device: torch.device | str) -> dict[str, Tensor]:
    """The columns of `targets` for the given row numbers, as `TokenBatch.targets` holds them."""
    columns = {name: torch.from_numpy(column[rows]) for name, column in targets.per_step.items()}
    for name, arrays in targets.per_token.items():
        columns[name] = right_padded([arrays[row] for row in rows.tolist()], torch.float32)
    return {name: column.to(device) for name, column in columns.items()}


def _rows(trajectories: TrajectoryBatch, indices: Sequence[int] | np.ndarray, *columns: str) -> list[dict]:
    table = trajectories.steps.select(list(columns))
    return table.take(pa.array(np.asarray(indices, np.int64))).to_pylist()


def _floats(values: list[float] | None, length: int) -> np.ndarray:
    """A row's list, zeros where it is null (demonstrations were not sampled; not every step is scored)."""
    return np.zeros(length, np.float32) if values is None else np.asarray(values, np.float32)


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _first_difference(left: list[int], right: list[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _assemble(
    prompts: list[dict[str, Tensor]],
    responses: list[np.ndarray],
    action_masks: list[np.ndarray],
    behaviour_logprobs: list[np.ndarray],
    influence: list[np.ndarray],
    answer_kinds: dict[str, int],
) -> TokenBatch:
    prompt_lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    response_lengths = [len(ids) for ids in responses]
    lengths = [p + r for p, r in zip(prompt_lengths, response_lengths, strict=True)]
    width = max(lengths)
    rows = len(prompts)
    input_ids = torch.zeros(rows, width, dtype=torch.int64)
    attention_mask = torch.zeros(rows, width, dtype=torch.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = torch.cat([prompt["input_ids"][0], torch.from_numpy(response)])
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    model_inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt):
        if name in model_inputs:
            continue
        parts = [prompt[name] for prompt in prompts if name in prompt]
        per_token = all(
            not part.is_floating_point() and part.shape == prompt["input_ids"].shape
            for part, prompt in zip(parts, prompts, strict=False)
        )
        if per_token:
            # Kinds of tokens, for instance which stand for an image.
            extended = torch.full((rows, width), answer_kinds.get(name, 0), dtype=parts[0].dtype)
            for row, part in enumerate(parts):
                extended[row, : part.shape[1]] = part[0]
            model_inputs[name] = extended
        else:
            model_inputs[name] = concatenate_padded(parts)
    return TokenBatch(
        model_inputs=model_inputs,
        prompt_lengths=torch.tensor(prompt_lengths),
        response_lengths=torch.tensor(response_lengths),
        response_ids=right_padded(responses, torch.int64),
        response_mask=right_padded([np.ones(n, bool) for n in response_lengths], torch.bool),
        action_mask=right_padded(action_masks, torch.bool),
        behaviour_logprobs=right_padded(behaviour_logprobs, torch.float32),
        influence=right_padded(influence, torch.float32),
        sample_weight=torch.ones(rows),
    )


def right_padded(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    """Ragged arrays as one (B, longest) tensor, zeros where padded."""
    padded = torch.zeros(len(arrays), max(map(len, arrays)), dtype=dtype)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = torch.from_numpy(np.array(array)).to(dtype)
    return padded


def concatenate_padded(parts: list[Tensor]) -> Tensor:
    """Image tensors of several prompts, joined along dimension 0 (samples, images or patches, as the family has it);
    every other dimension is padded with zeros to the longest, as the families' own processors do."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    joined = parts[0].new_zeros(sum(len(part) for part in parts), *shape)
    start = 0
    for part in parts:
        region = (slice(start, start + len(part)), *(slice(size) for size in part.shape[1:]))
        joined[region] = part
        start += len(part)
    return joined
