"""One rank of the learner: a model in a DeepSpeed engine, and whole updates of it. `learner.group` makes it an actor.

Every rank is given the same steps and does its share of the forward and backward passes; what all of them need is
exchanged. In an update a rank makes all passes over the steps that it owns (`learner.plan`), and needs the images of
these alone. Everything random is drawn from (seed, what for, update, …), so a learner that starts again from a
checkpoint goes on exactly as it would have.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.trajectory import TrajectoryBatch
from learner.settings import WarmStartSettings
from learner.setup import LearnerSetup

if TYPE_CHECKING:
    from torch import Tensor

    from learner.passes import StepResult

#: Optimizer steps in a row that are left out before the learner gives up.
SKIPPED_IN_A_ROW = 3

# What random numbers are drawn for: the first word of a seed. `learner.plan` has another.
_SUPERVISED = 3

logger = logging.getLogger(__name__)


def _with_optimizer_state(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method during which the optimizer's state is not in host memory (`learner.offload_optimizer`)."""

    @wraps(method)
    def run(self: LearnerRank, *arguments: Any, **named: Any) -> Any:
        with self.optimizer_state.at_hand():
            return method(self, *arguments, **named)

    return run


class LearnerRank:
    """Every method but `ping`, `prepare` and `rendezvous` is to be called on all ranks at once, and but for `images`
    with the same arguments."""

    def __init__(self, setup: LearnerSetup, rank: int, world_size: int) -> None:
        self.setup = setup
        self.rank = rank
        self.world_size = world_size
        self.updates = 0  # made so far
        self.version = 0  # of the weights that were last published
        self._course: Any = None
        self._skipped_in_a_row = 0
        self._open_publisher: Any = None
        self.passes: Any = None  # there once `start` is through

    def rendezvous(self) -> tuple[str, int]:
        """(this node's address, a free port on it)."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, address: str, port: int) -> None:
        """Connect to the other ranks and load the model. Raises what `learner.policy.model.load_policy` raises."""
        from learner.engine import DeepSpeedEngine, RankPlace

        setup = self.setup
        # First of all: DeepSpeed reads the environment when it is imported.
        place = RankPlace(self.rank, self.world_size, address, port)
        self.engine = DeepSpeedEngine(setup.learner, setup.model.dtype, place)
        import torch

        from actors.chat import ChatProcessor
        from learner.algorithms.entropy import EntropyBonus
        from learner.algorithms.registry import algorithm_class
        from learner.checkpoints.storage import LearnerStorage
        from learner.offload import OffloadedState
        from learner.passes import Passes
        from learner.policy.model import load_policy

        chat = ChatProcessor(setup.model.path)
        self.algorithm = algorithm_class(setup.algorithm.name)(setup.algorithm, EntropyBonus(setup.entropy))
        self.model = load_policy(
            setup.model.path,
            dtype=getattr(torch, setup.model.dtype),
            attention=setup.model.attention,
            lora=setup.learner.lora,
            value_hidden=setup.model.value_hidden,
            value_attention=setup.model.value_attention,
            gradient_checkpointing=setup.learner.gradient_checkpointing,
            value_gradient=self.algorithm.value_gradient,
            seed=setup.seed,
        )
        self.storage = LearnerStorage(self.engine, self.model, chat.processor)  # while parameters are whole
        self.engine.initialize(self.model, self.model.value_head)
        self.optimizer_state = OffloadedState(self.engine.optimizer, self.model, setup.learner)
        self.passes = Passes(setup, self.engine, chat)

    def ping(self) -> dict[str, int]:
        """pid, updates made, version published, forward passes done, resident memory in bytes."""
        import psutil

        return {
            "passes": self.passes.done if self.passes is not None else 0,
            "pid": os.getpid(),
            "update": self.updates,
            "version": self.version,
            "rss": psutil.Process().memory_info().rss,
        }

    # --- reinforcement learning

    def prepare(self, images: dict[str, bytes]) -> None:
        """Run the model's processor on images (key -> PNG bytes) of a coming update, beside the present one."""
        self.passes.prepare(images)

    @_with_optimizer_state
    def update(
        self, trajectories: TrajectoryBatch, update_index: int, images: dict[str, bytes] | None = None
    ) -> dict[str, float]:
        """One whole update of the policy on whole episodes; returns its metrics, the same on every rank.

        update_index: 0-based, sets the learning rate and the seeds, and is the version of the present weights. Steps
        that are older than `max_policy_lag` versions give context only. images: those that this rank needs
        (`learner.plan.images_of_rank`) where the trajectories have none. Metrics: those of the algorithm's loss as
        means per step and of its targets, of `mismatch_metrics`, `gradient_norm` (mean and `_max` over optimizer
        steps, before clipping), `learning_rate`, `optimizer_steps`, `skipped_steps`, `too_old` (share of steps).

        Raises `ValueError` where a column that the algorithm needs is null, `NotFinite`.
        """
        from learner.finite import require_finite_steps
        from learner.mismatch import mismatch_metrics, token_versions
        from learner.plan import plan_update
        from learner.policy.batch import target_columns

        setup = self.setup
        if images is not None:
            trajectories = TrajectoryBatch(trajectories.steps, images)
        self._check_columns(trajectories)
        versions = token_versions(trajectories)
        plan = plan_update(trajectories, setup, update_index, self.world_size)
        evaluation = self.passes.evaluate(trajectories, plan.trained, plan.owners)
        require_finite_steps("log-probabilities", evaluation.logprobs, trajectories)
        require_finite_steps("values", evaluation.values, trajectories)
        behaviour = trajectories.ragged("behaviour_logprobs", np.float32)
        metrics = mismatch_metrics(evaluation.logprobs, behaviour, versions, self.version)
        targets = self.algorithm.targets(trajectories, evaluation)
        self.model.value_head.rescale(targets.value_gain, targets.value_shift)
        self._set_learning_rates(update_index)
        self.engine.train(False, checkpointing=setup.learner.gradient_checkpointing)

        def loss_of(output: Any, batch: Any, indices: np.ndarray) -> Any:
            batch.targets = target_columns(targets, indices, self.engine.device)
            return self.algorithm.loss(output, batch)

        every = setup.entropy.gradient_every
        measuring = bool(every) and update_index % every == 0 and setup.learner.zero_stage < 3
        results: list[StepResult] = []
        for rows in plan.minibatches:
            measure = measuring and not results
            result = self.passes.step(
                trajectories, rows, loss_of, owners=plan.owners, with_entropy=True, with_part_norms=measure
            )
            self._check_step(result, trajectories)
            self._adapt_entropy(result, update_index)
            results.append(result)
            if self.algorithm.may_end_early and self.algorithm.enough(result.sums.means(self.engine)):
                break
        self.updates = update_index + 1
        metrics["learning_rate"] = self.engine.learning_rate
        metrics["too_old"] = float(1 - plan.trained.mean())
        metrics["entropy_coefficient"] = self.algorithm.entropy.coefficient
        return metrics | targets.metrics | self._over_steps(results)

    def token_logprobs(self, trajectories: TrajectoryBatch) -> list[np.ndarray]:
        """Log-probabilities (nats, float32 (n,) per step) of the response tokens under the present weights."""
        return list(self.passes.evaluate(trajectories, np.ones(len(trajectories), bool)).logprobs)

    # --- supervised fine-tuning

    def begin_supervised(self, demonstrations: TrajectoryBatch, settings: WarmStartSettings) -> None:
        """Take up a course of supervised fine-tuning, which `supervised_steps` goes through."""
        from learner.supervised.course import SupervisedCourse

        self._course = SupervisedCourse(demonstrations, settings, _seed(self.setup.seed, _SUPERVISED))

    @_with_optimizer_state
    def supervised_steps(self, count: int) -> list[dict[str, float]]:
        """The next `count` optimizer steps of the course (fewer at its end). Of each: `loss` (weighted by token), `nll`
        (nats per token), `gradient_norm`, `learning_rate`. Raises `NotFinite`."""
        import torch

        from learner.supervised.loss import Sft

        course = self._course
        if course is None:
            raise RuntimeError("begin_supervised has to come before supervised_steps")
        sft = Sft()

        def loss_of(output: Any, batch: Any, indices: np.ndarray) -> Any:
            return sft.loss(output, batch, course.token_weights(indices, batch))

        self.engine.train(True)
        reports = []
        for _ in range(min(count, course.settings.steps - course.step)):
            rate = course.learning_rate()
            self.engine.set_learning_rates(module=rate, head=0.0)
            torch.manual_seed(_seed(self.setup.seed, _SUPERVISED, course.step, self.rank))
            result = self.passes.step(course.demonstrations, course.indices(), loss_of, with_entropy=False)
            self._check_step(result, course.demonstrations)
            means = result.sums.means(self.engine)
            reports.append({**means, "gradient_norm": result.report.gradient_norm, "learning_rate": rate})
            course.step += 1
        return reports

    # --- weights to the policy servers

    def publish(self, version: int) -> Any:
        """Make the present weights, or the adapters alone (`learner.lora.serving`), available as `version`; the
        `WeightUpdate` on rank 0, None on the others. Raises `WeightTransferError`, `NotFinite`."""
        update = self._on_writer(lambda weights: self._publisher().publish(version, weights), self._published_weights())
        self.version = version
        return update

    def open_sync(self, engines: int, workers_per_engine: int, address: str, deadline_s: float) -> Any:
        """Rank 0, for transports that broadcast: the `CollectiveGroup` that servers are to join."""
        return self._publisher().open(engines, workers_per_engine, address, deadline_s)

    def connect_sync(self) -> None:
        """Rank 0: connect to the servers, which must be joining at the same time."""
        self._publisher().connect()

    def send(self) -> None:
        """Broadcast what `publish` announced, while the servers are loading it; the weights must be the same still."""
        self._on_writer(self._publisher().send, self._published_weights())

    def _on_writer(self, action: Callable[[Any], Any], weights: Iterator[Any]) -> Any:
        """The result of `action` on the weights, on rank 0. Every rank takes part in the gathering."""
        if self.rank == 0:
            return action(weights)
        for _ in weights:
            pass
        return None

    def _published_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What goes to the policy servers; every rank must exhaust it."""
        from learner.finite import finite_weights

        if self.setup.learner.served_adapters is not None:
            # Those of the forward pass: the engine computes in the same precision, so it applies the same numbers.
            return finite_weights(self.model.adapter_weights(self.engine.gather))
        return finite_weights(self.model.checkpoint_weights(self.engine.gather))

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

    @_with_optimizer_state
    def save_checkpoint(self, folder: Path) -> None:
        """Write all that going on needs; see `LearnerStorage.save_checkpoint`."""
        self.storage.save_checkpoint(folder, self.updates, self.version, self.algorithm.state())

    def save_model(self, folder: Path) -> None:
        """Write a complete Hugging Face model folder; see `LearnerStorage.save_model`."""
        self.storage.save_model(folder)

    @_with_optimizer_state
    def load_checkpoint(self, folder: Path) -> dict[str, int]:
        """Go back to where `save_checkpoint` was called; returns its `update` and `version`. Raises
        `CheckpointMismatch`."""
        record = self.storage.load_checkpoint(folder)
        self.updates, self.version = record.update, record.version
        self.algorithm.load(record.algorithm)
        return {"update": record.update, "version": record.version}

    # --- parts

    def _check_columns(self, trajectories: TrajectoryBatch) -> None:
        if len(trajectories) == 0:
            raise ValueError("an update needs at least one step")
        for column in self.algorithm.needs:
            if missing := trajectories.steps[column].null_count:
                raise ValueError(
                    f"algorithm {self.setup.algorithm.name} needs {column} of every step; {missing} of "
                    f"{len(trajectories)} steps have none"
                )

    def _set_learning_rates(self, update_index: int) -> None:
        from learner.schedules import learning_rate

        settings = self.setup.learner
        rate, of_head = learning_rate(settings, update_index, self.setup.total_updates), settings.value_learning_rate
        self.engine.set_learning_rates(module=rate, head=rate if of_head is None else of_head)

    def _check_step(self, result: StepResult, trajectories: TrajectoryBatch) -> None:
        """Count a step left out because its numbers are not finite. Raises `NotFinite` at the third in a row."""
        from learner.finite import NotFinite, named_steps

        self._skipped_in_a_row = 0 if result.report.applied else self._skipped_in_a_row + 1
        if result.report.applied:
            return
        rows = result.rows_not_finite
        made_by = f"the loss of {named_steps(trajectories, rows)} is not" if rows else "every loss of this rank is"
        message = f"an optimizer step was left out: its gradient is not finite ({made_by} finite)"
        logger.warning("%s", message)
        if self._skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise NotFinite(
                f"{self._skipped_in_a_row} optimizer steps in a row were left out; of the last one: {message}. Lower "
                "learner.learning_rate, or look at these steps in the run's trajectories."
            )

    def _adapt_entropy(self, result: StepResult, update_index: int) -> None:
        if self.algorithm.entropy.tuned and result.report.applied:
            weighted = result.sums.means(self.engine)["weighted_entropy"]
            self.algorithm.entropy.adapt(weighted, update_index / max(self.setup.total_updates - 1, 1))

    def _over_steps(self, results: Sequence[StepResult]) -> dict[str, float]:
        """Metrics of an update's optimizer steps: means per sample, norms over the steps that were taken."""
        from learner.metric_sums import MetricSums

        metrics = MetricSums.of([result.sums for result in results]).means(self.engine)
        reports = [result.report for result in results if result.report.applied]
        metrics["optimizer_steps"] = float(len(reports))
        metrics["skipped_steps"] = float(len(results) - len(reports))
        for name in ("gradient_norm", "head_gradient_norm"):
            norms = [getattr(report, name) for report in reports]
            metrics[name] = float(np.mean(norms)) if norms else float("nan")
            metrics[f"{name}_max"] = float(np.max(norms)) if norms else float("nan")
        norms_of_parts = results[0].part_norms
        for name, norm in norms_of_parts.items():
            metrics[f"part_norm_{name}"] = norm
        if norms_of_parts.get("policy") and "entropy" in norms_of_parts:
            metrics["entropy_gradient_share"] = norms_of_parts["entropy"] / norms_of_parts["policy"]
        return metrics


def _seed(*words: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])
