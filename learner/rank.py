"""One rank of the learner: a model in a DeepSpeed engine, and whole updates of it. `learner.group` makes it an actor.

Every rank is given the same trajectories and does its share of the forward and backward passes; what all of them need
is exchanged. Everything random is drawn from (seed, what for, update, …), so a learner that starts again from a
checkpoint goes on exactly as it would have.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.trajectory import TrajectoryBatch
from learner.settings import WarmStartSettings
from learner.setup import LearnerSetup

#: Passes without gradients keep no activations, so they take this many times as many steps at once.
FORWARD_ONLY_FACTOR = 4

# What random numbers are drawn for: the first word of a seed.
_ORDER, _DROPOUT, _SUPERVISED = 1, 2, 3


class LearnerRank:
    """Every method but `ping` and `rendezvous` is to be called on all ranks at once, with the same arguments."""

    def __init__(self, setup: LearnerSetup, rank: int, world_size: int) -> None:
        self.setup = setup
        self.rank = rank
        self.world_size = world_size
        self.updates = 0  # made so far
        self.version = 0  # of the weights that were last published
        self._course: Any = None
        self._open_publisher: Any = None

    def rendezvous(self) -> tuple[str, int]:
        """(this node's address, a free port on it)."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, address: str, port: int) -> None:
        """Connect to the other ranks and load the model. Raises what `learner.model.load_policy` raises."""
        from learner.engine import DeepSpeedEngine, RankPlace

        # First of all: DeepSpeed reads the environment when it is imported.
        setup = self.setup
        place = RankPlace(self.rank, self.world_size, address, port)
        self.engine = DeepSpeedEngine(setup.learner, setup.model.dtype, place)
        import torch

        from actors.chat import ChatProcessor
        from learner.algorithms.entropy import EntropyBonus
        from learner.algorithms.registry import algorithm_class
        from learner.batch import BatchBuilder
        from learner.model import load_policy
        from learner.storage import LearnerStorage

        self.chat = ChatProcessor(setup.model.path)
        self.builder = BatchBuilder(self.chat)
        self.algorithm = algorithm_class(setup.algorithm.name)(setup.algorithm, EntropyBonus(setup.entropy))
        model = load_policy(
            setup.model.path,
            dtype=getattr(torch, setup.model.dtype),
            lora=setup.learner.lora,
            value_hidden=setup.model.value_hidden,
            gradient_checkpointing=setup.learner.gradient_checkpointing,
            value_gradient=self.algorithm.value_gradient,
            seed=setup.seed,
        )
        self.storage = LearnerStorage(self.engine, model, self.chat.processor)  # while parameters are whole
        self.model = model
        self.engine.initialize(
            model,
            {"policy": list(model.vlm.parameters()), "value_head": list(model.value_head.parameters())},
        )

    def ping(self) -> dict[str, int]:
        """pid, updates made, version published, resident memory in bytes."""
        import psutil

        return {
            "pid": os.getpid(),
            "update": self.updates,
            "version": self.version,
            "rss": psutil.Process().memory_info().rss,
        }

    # --- reinforcement learning

    def update(self, trajectories: TrajectoryBatch, update_index: int) -> dict[str, float]:
        """One whole update of the policy on whole episodes; returns its metrics, the same on every rank.

        update_index: 0-based, sets the learning rate and the seeds. Metrics: those of the algorithm's loss as means
        per step and of its targets, of `mismatch_metrics`, `gradient_norm` (mean and `_max` over optimizer steps,
        before clipping), `learning_rate`, `optimizer_steps`. Raises `ValueError` where a column that the algorithm
        needs is null.
        """
        import torch

        from learner.algorithms.base import Evaluation
        from learner.batch import target_columns
        from learner.division import minibatches
        from learner.mismatch import mismatch_metrics, token_versions
        from learner.schedules import learning_rate

        if len(trajectories) == 0:
            raise ValueError("an update needs at least one step")
        setup = self.setup
        self._check_columns(trajectories)
        evaluation = Evaluation(*self._evaluate(trajectories))
        metrics = mismatch_metrics(
            evaluation.logprobs,
            trajectories.ragged("behaviour_logprobs", np.float32),
            token_versions(trajectories),
            self.version,
        )
        targets = self.algorithm.targets(trajectories, evaluation)

        starts = {"policy": setup.learner.learning_rate, "value_head": setup.learner.value_rate}
        rates = {
            group: learning_rate(setup.learner, start, update_index, setup.total_updates)
            for group, start in starts.items()
        }
        self.engine.set_learning_rates(rates)
        torch.manual_seed(_seed(setup.seed, _DROPOUT, update_index, self.rank))
        self.engine.train(True)
        lengths = _lengths(trajectories)

        def loss_of(output: Any, batch: Any, indices: np.ndarray) -> Any:
            batch.targets = target_columns(targets, indices, self.engine.device)
            return self.algorithm.loss(output, batch)

        sums: dict[str, float] = {}
        norms = []
        for epoch in range(setup.algorithm.epochs):
            seed = (setup.seed, _ORDER, update_index, epoch)
            for indices in minibatches(len(trajectories), setup.learner.minibatch, seed):
                report = self._optimizer_step(trajectories, indices, lengths, loss_of, sums, with_entropy=True)
                norms.append(report.gradient_norm)
        self.updates = update_index + 1

        metrics.update(self._over_ranks(sums))
        metrics["gradient_norm"] = float(np.mean(norms))
        metrics["gradient_norm_max"] = float(np.max(norms))
        metrics["optimizer_steps"] = float(len(norms))
        metrics["learning_rate"] = rates["policy"]
        return metrics | targets.metrics

    def token_logprobs(self, trajectories: TrajectoryBatch) -> list[np.ndarray]:
        """Log-probabilities (nats, float32 (n,) per step) of the response tokens under the present weights."""
        return self._evaluate(trajectories)[0]

    # --- supervised fine-tuning

    def begin_supervised(self, demonstrations: TrajectoryBatch, settings: WarmStartSettings) -> None:
        """Take up a course of supervised fine-tuning, which `supervised_steps` goes through."""
        from learner.supervised.course import SupervisedCourse

        self._course = SupervisedCourse(demonstrations, settings, _seed(self.setup.seed, _SUPERVISED))

    def supervised_steps(self, count: int) -> list[dict[str, float]]:
        """The next `count` optimizer steps of the course (fewer at its end). Of each: `loss` (weighted by token), `nll`
        (nats per token), `gradient_norm`, `learning_rate`."""
        import torch

        from learner.supervised.loss import Sft

        course = self._course
        if course is None:
            raise RuntimeError("begin_supervised has to come before supervised_steps")
        sft = Sft()
        lengths = _lengths(course.demonstrations)

        def loss_of(output: Any, batch: Any, indices: np.ndarray) -> Any:
            return sft.loss(output, batch, course.token_weights(indices, batch))

        self.engine.train(True)
        reports = []
        for _ in range(min(count, course.settings.steps - course.step)):
            self.engine.set_learning_rates({"policy": course.learning_rate(), "value_head": 0.0})
            torch.manual_seed(_seed(self.setup.seed, _SUPERVISED, course.step, self.rank))
            sums: dict[str, float] = {}
            report = self._optimizer_step(
                course.demonstrations, course.indices(), lengths, loss_of, sums, with_entropy=False
            )
            reports.append(
                {
                    **self._over_ranks(sums),
                    "gradient_norm": report.gradient_norm,
                    "learning_rate": course.learning_rate(),
                }
            )
            course.step += 1
        return reports

    # --- weights to the policy servers

    def publish(self, version: int) -> Any:
        """Make the present weights available as `version`, adapters merged; the `WeightUpdate` on rank 0, None on the
        others. Raises `WeightTransferError`."""
        weights = self.model.checkpoint_weights(self.engine.gather)
        update = None
        if self.rank == 0:
            update = self._publisher().publish(version, weights)
        else:
            for _ in weights:  # every rank takes part in the gathering
                pass
        self.version = version
        return update

    def open_sync(self, engines: int, workers_per_engine: int, address: str, deadline_s: float) -> Any:
        """Rank 0, for transports that broadcast: the `CollectiveGroup` that servers are to join."""
        return self._publisher().open(engines, workers_per_engine, address, deadline_s)

    def connect_sync(self) -> None:
        """Rank 0: meet the servers, which have to be joining meanwhile."""
        self._publisher().connect()

    def send(self) -> None:
        """Rank 0: broadcast what `publish` announced, while the servers are loading it."""
        self._publisher().send()

    def _publisher(self) -> Any:
        from learner.publish import make_publisher

        publishing = self.setup.publishing
        if publishing is None:
            raise RuntimeError("this learner was started without `publishing`, so it has nowhere to publish to")
        if self._open_publisher is None:
            self._open_publisher = make_publisher(
                publishing.transport, run=publishing.run, fallback_folder=publishing.fallback_folder
            )
        return self._open_publisher

    # --- weights on disk

    def save_checkpoint(self, folder: Path) -> None:
        """Write all that going on needs; see `LearnerStorage.save_checkpoint`."""
        self.storage.save_checkpoint(folder, update=self.updates, version=self.version)

    def save_model(self, folder: Path) -> None:
        """Write a complete Hugging Face model folder; see `LearnerStorage.save_model`."""
        self.storage.save_model(folder)

    def load_checkpoint(self, folder: Path) -> dict[str, int]:
        """Go back to where `save_checkpoint` was called; returns its `update` and `version`. Raises
        `CheckpointMismatch`."""
        record = self.storage.load_checkpoint(folder)
        self.updates, self.version = record.update, record.version
        return {"update": record.update, "version": record.version}

    # --- parts

    def _check_columns(self, trajectories: TrajectoryBatch) -> None:
        for column in self.algorithm.needs:
            if missing := trajectories.steps[column].null_count:
                raise ValueError(
                    f"algorithm {self.setup.algorithm.name} needs {column} of every step; {missing} of "
                    f"{len(trajectories)} steps have none"
                )

    def _share(self, indices: np.ndarray, lengths: np.ndarray, factor: int = 1) -> Sequence[Any]:
        from learner.division import divide

        return divide(indices, lengths, self.setup.learner.micro_batch * factor, self.rank, self.world_size)

    def _forward(self, batch: Any, with_entropy: bool) -> Any:
        return self.engine.forward(
            batch,
            temperature=self.setup.temperature,
            banned_token_ids=self.chat.banned_token_ids,
            token_chunk=self.setup.learner.token_chunk,
            with_entropy=with_entropy,
        )

    def _optimizer_step(
        self,
        trajectories: TrajectoryBatch,
        indices: np.ndarray,
        lengths: np.ndarray,
        loss_of: Callable[[Any, Any, np.ndarray], Any],
        sums: dict[str, float],
        with_entropy: bool,
    ) -> Any:
        """One step of the optimizer on the given rows, whose gradient is that of the mean loss over them however they
        are divided. `loss_of(output, batch, rows)` -> (sum of the loss, sums of metrics); metrics are added to
        `sums`, of those named `…_max` the largest is kept."""
        for part in self._share(indices, lengths):
            batch = self.builder.build(trajectories, part.indices)
            if part.filler:
                batch.sample_weight.zero_()
            batch = batch.to(self.engine.device)
            loss, of_part = loss_of(self._forward(batch, with_entropy), batch, part.indices)
            self.engine.backward(loss * (self.world_size / len(indices)))
            for name, value in of_part.items():
                so_far = sums.get(name, 0.0)
                sums[name] = max(so_far, value) if name.endswith("_max") else so_far + value
        return self.engine.step()

    def _evaluate(self, trajectories: TrajectoryBatch) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Log-probabilities of the response tokens, values of the states (N,), values of the final observations (N,)
        (NaN where there is none); float32, without dropout. Ranks share the work and all get everything."""
        import torch

        self.engine.train(False)
        response_lengths = [len(ids) for ids in trajectories.ragged("response_ids", np.int32)]
        offsets = np.concatenate([[0], np.cumsum(response_lengths)]).astype(np.int64)
        count = len(trajectories)
        tokens, values, final_values = np.zeros(offsets[-1]), np.zeros(count), np.zeros(count)
        with torch.no_grad():
            for part in self._share(np.arange(count), _lengths(trajectories), FORWARD_ONLY_FACTOR):
                batch = self.builder.build(trajectories, part.indices).to(self.engine.device)
                output = self._forward(batch, with_entropy=False)
                if part.filler:
                    continue
                values[part.indices] = output.values.float().cpu().numpy()
                for index, row in zip(part.indices.tolist(), output.logprobs.cpu().numpy(), strict=True):
                    tokens[offsets[index] : offsets[index + 1]] = row[: response_lengths[index]]
            final_lengths = np.array([len(ids) for ids in trajectories.ragged("final_prompt_ids", np.int32)])
            final = np.flatnonzero([image is not None for image in trajectories.column("final_image")])
            for part in self._share(final, final_lengths, FORWARD_ONLY_FACTOR):
                batch = self.builder.build_final(trajectories, part.indices).to(self.engine.device)
                output = self._forward(batch, with_entropy=False)
                if not part.filler:
                    final_values[part.indices] = output.values.float().cpu().numpy()
        # Every entry was filled in by one rank and is zero on the others, so the sum is that rank's number exactly.
        everything = self.engine.sum_over_ranks(np.concatenate([tokens, values, final_values])).astype(np.float32)
        all_tokens, all_values, all_finals = np.split(everything, [len(tokens), len(tokens) + count])
        has_final = np.zeros(count, bool)
        has_final[final] = True
        return np.split(all_tokens, offsets[1:-1]), all_values, np.where(has_final, all_finals, np.float32(np.nan))

    def _over_ranks(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums of metrics on this rank -> means per sample over all ranks; of those named `…_max` the largest."""
        names = sorted(sums)
        table = np.zeros((self.world_size, len(names)))
        table[self.rank] = [sums[name] for name in names]
        columns = dict(zip(names, self.engine.sum_over_ranks(table).T, strict=True))
        samples = columns.pop("samples").sum()
        return {
            name: float(column.max() if name.endswith("_max") else column.sum() / samples)
            for name, column in columns.items()
        }


def _lengths(trajectories: TrajectoryBatch) -> np.ndarray:
    """int64 (N,), tokens of prompt and response."""
    parts = [trajectories.ragged(column, np.int32) for column in ("prompt_ids", "response_ids")]
    return np.array([len(prompt) + len(response) for prompt, response in zip(*parts, strict=True)], np.int64)


def _seed(*words: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])
