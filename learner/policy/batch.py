"""From trajectories to the tensors of one forward pass: right padded, nothing cut, nothing tokenised again.

The model's own processor is asked about (prompt, image) only: it gives the image tensors of its family and must give
exactly the prompt ids that the engine saw. Response ids are those that were sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.chat import ChatProcessor
from actors.images import RecentImages
from actors.trajectory import TrajectoryBatch
from learner.algorithms.base import Targets
from learner.plan import step_lengths
from learner.policy.image_tensors import ImageTensors, nbytes

#: Answers whose action parts a `BatchBuilder` remembers; of a thousand tokens each, they take up 128 MiB.
ACTION_STARTS = 16384

#: Bytes of prompts' ids that it remembers.
PROMPT_BYTES = 64 << 20

#: Prompts are shared where no more than this share of them is distinct.
LARGEST_DISTINCT_SHARE = 0.75


class PromptMismatch(ValueError):
    """The processor gives other prompt ids than those the engine saw: not the model that made the trajectory."""


@dataclass
class TokenBatch:
    """B steps as tensors; L = longest prompt + response, R = longest response of the batch, padding on the right."""

    #: What the model's forward takes: `input_ids` int64 (B, L), `attention_mask` int64 (B, L), the family's own
    #: per-token inputs (B, L) and image tensors. With `prompt_of`, of P prompts without responses instead.
    model_inputs: dict[str, Tensor]
    prompt_lengths: Tensor  # int64 (B,), tokens, image tokens included
    response_lengths: Tensor  # int64 (B,)
    response_ids: Tensor  # int64 (B, R), 0 where padded
    response_mask: Tensor  # bool (B, R), True on response tokens
    action_mask: Tensor  # bool (B, R), True on the action part, see `ChatProcessor.action_start`
    behaviour_logprobs: Tensor  # float32 (B, R), nats, of the distribution sampled from; 0 where padded or none
    influence: Tensor  # float32 (B, R) in [0, 1]; 0 where padded or not scored
    sample_weight: Tensor  # float32 (B,), 0 for a sample that only fills up a micro-batch
    #: int64 (B,), the row of `model_inputs` that holds a step's prompt; None: its own, its response behind it.
    prompt_of: Tensor | None = None
    #: Columns of `learner.algorithms.base.Targets`: float32, (B,) per step and (B, R) per token, 0 where padded.
    targets: dict[str, Tensor] = field(default_factory=dict)
    _response_places: Tensor | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def response_places(self) -> Tensor:
        """int64 (T,): where the T response tokens are in a flattened (B · R). Known before the batch is moved, so that
        no pass waits for the device to count them."""
        if self._response_places is None:
            self._response_places = self.response_mask.flatten().nonzero()[:, 0]
        return self._response_places

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`; of a pinned batch, copied while the program goes on."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> TokenBatch:
        """The same batch in memory that a GPU reads by itself."""
        return self._changed(lambda tensor: tensor.pin_memory() if tensor.numel() else tensor)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        changed = {
            each.name: change(value)
            for each in fields(self)
            if each.init and isinstance(value := getattr(self, each.name), Tensor)
        }
        inputs = {name: change(tensor) for name, tensor in self.model_inputs.items()}
        targets = {name: change(tensor) for name, tensor in self.targets.items()}
        batch = replace(self, model_inputs=inputs, targets=targets, **changed)
        batch._response_places = change(self.response_places)
        return batch


class StepColumns:
    """What forward passes need of the steps of a batch, as lists and arrays, made once for all passes."""

    def __init__(self, trajectories: TrajectoryBatch) -> None:
        self.trajectories = trajectories
        steps = trajectories.steps
        self.prompts, self.images = steps["prompt"].to_pylist(), steps["image"].to_pylist()
        self.final_prompts, self.final_images = steps["final_prompt"].to_pylist(), steps["final_image"].to_pylist()
        self.prompt_ids = trajectories.ragged("prompt_ids", np.int64)
        self.final_prompt_ids = trajectories.ragged("final_prompt_ids", np.int64)
        self.response_ids = trajectories.ragged("response_ids", np.int64)
        self.action_starts = steps["action_start"].to_pylist()
        #: Zeros where null: demonstrations were not sampled, and not every step is scored.
        self.behaviour_logprobs = self._floats("behaviour_logprobs")
        self.influence = self._floats("influence")
        self.lengths = step_lengths(trajectories)

    def _floats(self, column: str) -> list[np.ndarray]:
        values = self.trajectories.ragged(column, np.float32)
        known = self.trajectories.steps[column].is_valid().to_pylist()
        empty = [np.zeros(len(ids), np.float32) for ids in self.response_ids]
        return [row if there else zeros for row, there, zeros in zip(values, known, empty, strict=True)]


class BatchBuilder:
    """Builds `TokenBatch`es, remembering what the processor made of recent images and prompts."""

    def __init__(self, chat: ChatProcessor, image_cache_bytes: int = 256 << 20, threads: int = 1) -> None:
        """image_cache_bytes, threads: see `ImageTensors`."""
        self._chat = chat
        self._tensors = ImageTensors(chat, image_cache_bytes, threads=threads)
        self._prompts: RecentImages[dict[str, Tensor]] = RecentImages(PROMPT_BYTES)
        self._columns: StepColumns | None = None
        # Every pass over a batch asks again, and each time the tokenizer would decode the answer several times.
        self._action_start = lru_cache(maxsize=ACTION_STARTS)(
            lambda ids, start: chat.action_start(np.frombuffer(ids, np.int64), start)
        )

    def prepare(self, images: Mapping[str, bytes]) -> None:
        """Run the processor on images of a coming batch. Another thread may build batches meanwhile."""
        self._tensors.prepare(images)

    def columns(self, trajectories: TrajectoryBatch) -> StepColumns:
        """Those of a batch; remembered until another one is asked for."""
        if self._columns is None or self._columns.trajectories is not trajectories:
            self._columns = StepColumns(trajectories)
        return self._columns

    def build(
        self, trajectories: TrajectoryBatch, indices: Sequence[int] | np.ndarray, share_prompts: bool = False
    ) -> TokenBatch:
        """The steps of the given row numbers. share_prompts: hold each prompt once where many are equal.

        Raises `PromptMismatch`, and `KeyError` for an image that is missing.
        """
        columns, rows = self.columns(trajectories), np.asarray(indices).tolist()
        responses = [columns.response_ids[row] for row in rows]
        action_masks = []
        for row, ids in zip(rows, responses, strict=True):
            mask = np.zeros(len(ids), bool)
            mask[self._action_start(ids.tobytes(), columns.action_starts[row]) :] = True
            action_masks.append(mask)
        shown = [(columns.images[row], columns.prompts[row]) for row in rows]
        prompts = self._encode(trajectories, shown, [columns.prompt_ids[row] for row in rows])
        return _assemble(
            prompts,
            responses,
            action_masks,
            [columns.behaviour_logprobs[row] for row in rows],
            [columns.influence[row] for row in rows],
            self._chat.answer_kinds,
            _repeated(shown) if share_prompts else None,
        )

    def build_final(self, trajectories: TrajectoryBatch, indices: Sequence[int] | np.ndarray) -> TokenBatch:
        """The observations after the last step of cut-off episodes (R = 0), for the values they still had ahead.

        Raises `ValueError` for a row that has no final observation.
        """
        columns, rows = self.columns(trajectories), np.asarray(indices).tolist()
        shown = [(columns.final_images[row], columns.final_prompts[row]) for row in rows]
        for row, (image, _) in zip(rows, shown, strict=True):
            if image is None:
                raise ValueError(f"step {row} of the batch has no final observation to take a value of")
        prompts = self._encode(trajectories, shown, [columns.final_prompt_ids[row] for row in rows])
        nothing = [np.empty(0, np.int64) for _ in rows]
        return _assemble(prompts, nothing, nothing, nothing, nothing, self._chat.answer_kinds)

    def _encode(
        self, trajectories: TrajectoryBatch, shown: Sequence[tuple[str, str]], expected_ids: Sequence[np.ndarray]
    ) -> list[dict[str, Tensor]]:
        """shown: (image, prompt) of each row; expected_ids: int64 (P,) of each, or empty where the engine has not seen
        the prompt."""
        tensors = self._tensors.of_all({image: trajectories.images[image] for image, _ in shown})
        return [
            self._encode_prompt(tensors[image], image, prompt, ids)
            for (image, prompt), ids in zip(shown, expected_ids, strict=True)
        ]

    def _encode_prompt(
        self, of_image: dict[str, Any], image: str, prompt: str, expected_ids: np.ndarray
    ) -> dict[str, Tensor]:
        key = f"{image} {prompt}"
        of_tokens = self._prompts.get(key)
        if of_tokens is None:
            of_tokens = self._chat.with_text(of_image, prompt)
            self._prompts.put(key, of_tokens, nbytes(of_tokens))
        ids = of_tokens["input_ids"][0].numpy()
        if len(expected_ids) and not np.array_equal(ids, expected_ids):
            raise PromptMismatch(
                f"the processor of {self._chat.path!r} makes {len(ids)} prompt tokens where the engine saw "
                f"{len(expected_ids)} (first difference at token {_first_difference(ids, expected_ids)}). "
                "Engine and learner must be given the same model folder and the same chat template."
            )
        return {name: value for name, value in (of_image | of_tokens).items() if isinstance(value, Tensor)}


def target_columns(targets: Targets, rows: np.ndarray, device: torch.device | str) -> dict[str, Tensor]:
    """The columns of `targets` for the given row numbers, as `TokenBatch.targets` holds them."""
    columns = {name: torch.from_numpy(column[rows]) for name, column in targets.per_step.items()}
    for name, arrays in targets.per_token.items():
        columns[name] = right_padded([arrays[row] for row in rows.tolist()], torch.float32)
    on_gpu = torch.device(device).type == "cuda"
    return {
        name: (column.pin_memory() if on_gpu else column).to(device, non_blocking=True)
        for name, column in columns.items()
    }


def _first_difference(left: np.ndarray, right: np.ndarray) -> int:
    shorter = min(len(left), len(right))
    return int(np.append(left[:shorter] != right[:shorter], True).argmax())


def _assemble(
    prompts: list[dict[str, Tensor]],
    responses: list[np.ndarray],
    action_masks: list[np.ndarray],
    behaviour_logprobs: list[np.ndarray],
    influence: list[np.ndarray],
    answer_kinds: dict[str, int],
    repeated: tuple[list[int], list[int]] | None = None,
) -> TokenBatch:
    """repeated: see `_repeated`; None: every row has a prompt of its own."""
    prompt_lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    response_lengths = [len(ids) for ids in responses]
    if repeated is None:
        model_inputs = _model_inputs(prompts, responses, answer_kinds)
    else:
        distinct = [prompts[row] for row in repeated[0]]
        model_inputs = _model_inputs(distinct, [np.empty(0, np.int64)] * len(distinct), answer_kinds)
    return TokenBatch(
        model_inputs=model_inputs,
        prompt_lengths=torch.tensor(prompt_lengths),
        response_lengths=torch.tensor(response_lengths),
        response_ids=right_padded(responses, torch.int64),
        response_mask=right_padded([np.ones(n, bool) for n in response_lengths], torch.bool),
        action_mask=right_padded(action_masks, torch.bool),
        behaviour_logprobs=right_padded(behaviour_logprobs, torch.float32),
        influence=right_padded(influence, torch.float32),
        sample_weight=torch.ones(len(prompts)),
        prompt_of=None if repeated is None else torch.tensor(repeated[1]),
    )


def _repeated(prompts: Sequence[Hashable]) -> tuple[list[int], list[int]] | None:
    """(position of each distinct prompt, and for every prompt which of those it equals); None where few repeat, since
    prompts and responses in a pass each cost more than both in one."""
    first = dict.fromkeys(prompts)
    if len(first) > LARGEST_DISTINCT_SHARE * len(prompts):
        return None
    number = {prompt: index for index, prompt in enumerate(first)}
    return [prompts.index(prompt) for prompt in first], [number[prompt] for prompt in prompts]


def _model_inputs(
    prompts: list[dict[str, Tensor]], responses: list[np.ndarray], answer_kinds: dict[str, int]
) -> dict[str, Tensor]:
    """Prompts with a response behind each, as `TokenBatch.model_inputs`; answer_kinds: `ChatProcessor.answer_kinds`."""
    rows = len(prompts)
    width = max(prompt["input_ids"].shape[1] + len(ids) for prompt, ids in zip(prompts, responses, strict=True))
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
    return model_inputs


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
