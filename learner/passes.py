"""Passes of the model over a batch: without gradients for what is known before an update, with them for one step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.chat import ChatProcessor
from actors.trajectory import TrajectoryBatch
from learner.algorithms.base import Evaluation
from learner.division import MicroBatch, dealt, divide
from learner.engine import DeepSpeedEngine, StepReport
from learner.metric_sums import MetricSums
from learner.plan import final_rows
from learner.policy.batch import BatchBuilder, TokenBatch
from learner.policy.frozen_tower import keep_features
from learner.policy.model import PolicyOutput
from learner.policy.shared_prompts import shares_prompts
from learner.setup import LearnerSetup

#: Passes without gradients keep no activations, so they take this many times as many steps at once.
FORWARD_ONLY_FACTOR = 4

#: Micro-batches that are made beside the present one.
AHEAD = 2

#: Parts of a loss whose gradients are compared.
MEASURED_PARTS = {"policy", "entropy"}

#: (what the model says, the micro-batch, its row numbers) -> (parts of the loss, metrics), float32 (B,) each.
LossOf = Callable[[PolicyOutput, TokenBatch, np.ndarray], tuple[dict[str, Tensor], dict[str, Tensor]]]


@dataclass
class StepResult:
    """One optimizer step."""

    report: StepReport
    sums: MetricSums
    rows_not_finite: list[int] = field(default_factory=list)  # of this rank's steps, whose loss is NaN or infinite
    part_norms: dict[str, float] = field(default_factory=dict)  # gradient norm of each part of the loss


class Passes:
    """All ranks call every method at once, with the same arguments; each does its share."""

    def __init__(self, setup: LearnerSetup, engine: DeepSpeedEngine, chat: ChatProcessor) -> None:
        self._setup = setup
        self._engine = engine
        self._chat = chat
        threads = setup.learner.rank_threads
        self._builder = BatchBuilder(chat, setup.learner.image_cache_bytes, threads)
        self._beside = ThreadPoolExecutor(1, "next micro-batch") if threads > 1 else None
        if setup.learner.zero_stage < 3:  # ranks see different pictures; in stage 3 they exchange a tower's weights
            policy: Any = engine.module
            keep_features(policy.hf_model.base_model, setup.learner.feature_cache_bytes)
        # Which prompts repeat differs from rank to rank. Checkpointed layers keep no keys and values.
        self._may_share = (
            engine.graphs_may_differ
            and not setup.learner.gradient_checkpointing
            and shares_prompts(engine.module.hf_model)
        )
        self.done = 0  # forward passes, the sign that a long call comes further

    def prepare(self, images: Mapping[str, bytes]) -> None:
        """Run the model's processor on images of a coming batch; may be called beside everything else."""
        self._builder.prepare(images)

    def evaluate(
        self, trajectories: TrajectoryBatch, trained: np.ndarray, owners: np.ndarray | None = None
    ) -> Evaluation:
        """What the present model says of every step, float32, without dropout. trained: see `Evaluation`; owners: see
        `learner.plan.UpdatePlan`, None: steps are dealt out."""
        self._engine.train(False)
        columns = self._builder.columns(trajectories)
        response_lengths = [len(ids) for ids in columns.response_ids]
        offsets = np.concatenate([[0], np.cumsum(response_lengths)]).astype(np.int64)
        count = len(trajectories)
        tokens, values, final_values = np.zeros(offsets[-1]), np.zeros(count), np.zeros(count)
        parts = self._share(np.arange(count), columns.lengths, owners, FORWARD_ONLY_FACTOR)
        said = self._say(parts, lambda rows: self._builder.build(trajectories, rows, self._may_share))
        for rows, output in said:
            values[rows] = output.values.float().cpu().numpy()
            for index, row in zip(rows.tolist(), output.logprobs.cpu().numpy(), strict=True):
                tokens[offsets[index] : offsets[index + 1]] = row[: response_lengths[index]]
        final = final_rows(trajectories)
        # Nobody has counted the tokens of final observations; they are about those of the step before.
        before = np.array([len(ids) for ids in columns.prompt_ids])
        parts = self._share(final, before, owners, FORWARD_ONLY_FACTOR)
        for rows, output in self._say(parts, lambda rows: self._builder.build_final(trajectories, rows)):
            final_values[rows] = output.values.float().cpu().numpy()
        # Every entry was filled in by one rank and is zero on the others, so the sum is that rank's number exactly.
        everything = self._engine.sum_over_ranks(np.concatenate([tokens, values, final_values])).astype(np.float32)
        all_tokens, all_values, all_finals = np.split(everything, [len(tokens), len(tokens) + count])
        has_final = np.zeros(count, bool)
        has_final[final] = True
        return Evaluation(
            logprobs=np.split(all_tokens, offsets[1:-1]),
            values=all_values,
            final_values=np.where(has_final, all_finals, np.float32(np.nan)),
            trained=trained,
        )

    def step(
        self,
        trajectories: TrajectoryBatch,
        rows: np.ndarray,
        loss_of: LossOf,
        *,
        owners: np.ndarray | None = None,
        with_entropy: bool,
        with_part_norms: bool = False,
    ) -> StepResult:
        """One step of the optimizer, whose gradient is that of the mean loss over `rows` however they are divided.

        owners: as for `evaluate`. with_part_norms: measure the gradient norms of the policy's and the entropy's part
        before the step, which holds two more gradients for that long.
        """
        sums = MetricSums()
        seen: list[tuple[np.ndarray, Tensor]] = []  # row numbers and their loss, looked at when the step goes wrong
        gradients: dict[str, list[Tensor]] = {}
        scale = self._engine.place.world_size / len(rows)
        micro_batches = self._share(rows, self._builder.columns(trajectories).lengths, owners)
        may_share = self._may_share and not self._engine.dropout
        for part, batch in self._batches(
            micro_batches, lambda rows: self._builder.build(trajectories, rows, may_share)
        ):
            parts, metrics = loss_of(self._forward(batch, with_entropy), batch, part.indices)
            totals = {name: (values * batch.sample_weight).sum() * scale for name, values in parts.items()}
            loss = torch.stack(list(totals.values())).sum()
            seen.append((part.indices, loss.detach()))
            if with_part_norms:
                for name in MEASURED_PARTS & totals.keys():
                    found = self._engine.gradients(totals[name])
                    so_far = gradients.get(name)
                    gradients[name] = found if so_far is None else [a + b for a, b in zip(so_far, found, strict=True)]
            self._engine.backward(loss)
            sums.add(metrics, batch.sample_weight)
        norms = {name: self._engine.norm_over_ranks(gradients[name]) for name in sorted(gradients)}
        report = self._engine.step()
        broken = [] if report.applied else [indices for indices, loss in seen if not bool(loss.isfinite())]
        rows_not_finite = [row for indices in broken for row in indices.tolist()]
        return StepResult(report, sums, rows_not_finite, norms)

    def _say(
        self, parts: list[MicroBatch], build: Callable[[np.ndarray], TokenBatch]
    ) -> list[tuple[np.ndarray, PolicyOutput]]:
        """(row numbers, what the model says of them), without gradient. Nothing is read from the device before all of
        it has been asked for."""
        with torch.no_grad():
            said = [(part, self._forward(batch, with_entropy=False)) for part, batch in self._batches(parts, build)]
        return [(part.indices, output) for part, output in said if not part.filler]

    def _batches(
        self, parts: list[MicroBatch], build: Callable[[np.ndarray], TokenBatch]
    ) -> Iterator[tuple[MicroBatch, TokenBatch]]:
        """Each micro-batch on the device. Where there are threads for it, the next one is made meanwhile."""
        device = self._engine.device

        def made(part: MicroBatch) -> TokenBatch:
            batch = build(part.indices)
            if part.filler:
                batch.sample_weight.zero_()
            return batch.pinned() if device.type == "cuda" else batch

        if self._beside is None:
            for part in parts:
                yield part, made(part).to(device)
            return
        coming = deque((part, self._beside.submit(made, part)) for part in parts[:AHEAD])
        for following in [*parts[AHEAD:], *[None] * len(coming)]:
            part, batch = coming.popleft()
            if following is not None:
                coming.append((following, self._beside.submit(made, following)))
            yield part, batch.result().to(device)

    def _share(
        self, rows: np.ndarray, lengths: np.ndarray, owners: np.ndarray | None, factor: int = 1
    ) -> list[MicroBatch]:
        place, micro_batch = self._engine.place, self._setup.learner.micro_batch * factor
        if owners is None:
            owners = dealt(rows, lengths, micro_batch, place.world_size)
        tokens = self._setup.learner.micro_tokens
        return divide(rows, lengths, micro_batch, owners, place.rank, None if tokens is None else tokens * factor)

    def _forward(self, batch: TokenBatch, with_entropy: bool) -> Any:
        self.done += 1
        return self._engine.forward(
            batch,
            temperature=self._setup.temperature,
            banned_token_ids=self._chat.banned_token_ids,
            token_chunk=self._setup.learner.token_chunk,
            with_entropy=with_entropy,
        )
