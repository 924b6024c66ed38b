"""The scoring pool: scorers and one trainer of the SCM, as Ray actors (CoSo, arXiv 2505.03792).

A score depends on its utterance, its action and the SCM's version alone, to the last bit. So results do not depend on
how the work is cut into tasks, on the number of scorers, or on which scorer takes which task. A trainer that dies, or
makes no progress within its deadline, is replaced; the new one continues from the state that the trainer returned last.
Scorers are replaced too (see `scoring.pool.scorers`); they have no state but the weights, which each task names.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError
from torch import Tensor

from actors.repeated_failures import RepeatedFailures
from scoring.effects.effects import influence_statistics
from scoring.effects.estimators import WITHOUT_SCM
from scoring.effects.parser_effects import ParserSource
from scoring.effects.tokens import TokenFacts
from scoring.pool.cache import ScoreCache, score_key
from scoring.pool.scorers import ACTOR_GONE, PROGRESS_POLL_S, ScorerPool, ScoringError
from scoring.pool.workers import ScmTrainerActor, Scorer, to_arrays
from scoring.scm.shape import ScmSizes, check_shape
from scoring.scm.training import ScmTrainingReport
from scoring.settings import ScoringSettings
from scoring.utterances import check_utterances, cut_into_tasks, distinct_pairs, flatten, split

logger = logging.getLogger(__name__)


ScmWeights = tuple[int, ray.ObjectRef | None]
"""A version of the SCM and the reference of its weights."""


TASK_TOKENS = 1 << 15
"""Counterfactual tokens (n squared for an utterance of n tokens) that a scorer takes at a time, at most; one utterance
at least. It bounds the time of a task, and so what is lost when a scorer dies."""


@dataclass(frozen=True, kw_only=True)
class ScoringContext:
    """What a pool cannot know from its settings: the run's tokenizer, environment, seed and cluster.

    tokens: facts of the policy's tokenizer.
    head_sizes: number of labels of each head of the environment's label space, in its order.
    parser: the environment's, for the estimators that parse; None where it has none.
    seed: of the SCM's first weights and of the sampling in its training.
    actor_cpus, actor_gpus: what Ray reserves for each scorer and for the SCM's trainer; may be fractions.
    scorer_strategies, trainer_strategy: Ray's scheduling strategies, one for each scorer; none: Ray decides.
    max_failures: an actor that fails, or a task whose scorer fails, this many times in a row is an error. The same
        failure twice without progress in between is one at once.
    """

    tokens: TokenFacts
    head_sizes: tuple[int, ...]
    parser: ParserSource | None = None
    seed: int
    actor_cpus: float
    actor_gpus: float = 0.0
    scorer_strategies: Sequence[Any] = ()
    trainer_strategy: Any = None
    max_failures: int

    def __post_init__(self) -> None:
        if self.max_failures < 1:
            raise ValueError(f"max_failures is {self.max_failures}: give a whole number of at least 1")


class ScoringPool:
    """Driver's side of the pool. Ray must be initialised.

    One thread at a time may call `score` and `check`, and another one `train`. `score` uses the weights of the time it
    begins; the next `score` uses the new ones.

    version: of the SCM's weights that the next `score` uses; 0 at first, every `train` adds 1.
    sizes: of the SCM.
    Raises ValueError when the context does not fit the settings.
    """

    def __init__(self, settings: ScoringSettings, context: ScoringContext) -> None:
        if settings.device == "cuda" and not context.actor_gpus:
            raise ValueError("scoring.device is cuda, but actor_gpus is 0: Ray would hide the GPUs")
        self.settings = settings
        self.context = context
        self.sizes = ScmSizes(vocab_size=context.tokens.vocab_size, head_sizes=context.head_sizes)
        self._cache = ScoreCache(settings.cache_bytes)
        self._scorers = ScorerPool(
            self._make_scorer,
            count=settings.workers,
            start_deadline_s=settings.start_deadline_s,
            task_deadline_s=settings.deadline_s,
            max_failures=context.max_failures,
        )
        self._trainer: Any = None
        self._trainer_current = False  # whether the trainer's state is `_state`
        self._trainers_replaced = 0
        self._repeated = RepeatedFailures()
        # References that the driver owns: they outlive the trainer's process. Version and weights change together.
        self._current: ScmWeights = (0, None)
        self._state: ray.ObjectRef | None = None

    @property
    def version(self) -> int:
        return self._current[0]

    @property
    def weights(self) -> ScmWeights:
        """The SCM's current weights, for several calls of `score` with the same weights while `train` runs."""
        return self._current

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits for `score` or `train`. Where not, they take only cores that would be idle. May be set
        at any time; it holds from the next utterance and minibatch on, also of calls under way."""
        return self._scorers.waited_for

    @waited_for.setter
    def waited_for(self, waited: bool) -> None:
        self._scorers.waited_for = waited
        if (trainer := self._trainer) is not None:
            trainer.set_waited_for.remote(waited)

    @property
    def recoveries(self) -> dict[str, int]:
        """Actors replaced since `start`: `{"scorer": n, "scm_trainer": n}`."""
        return {"scorer": self._scorers.replaced, "scm_trainer": self._trainers_replaced}

    def start(self) -> None:
        """Start all actors and wait until each answers; when one does not, end all and raise ScoringError."""
        try:
            self._trainer = self._make_trainer()  # starts while the scorers do
            self._trainer_current = self._state is None
            self._scorers.start()
            self._ask_trainer("snapshot", "start", self.settings.start_deadline_s)
        except BaseException:
            self.close()
            raise

    def score(
        self,
        utterances: Sequence[NDArray[np.integer]],
        labels: NDArray[np.integer],
        estimator: str | None = None,
        weights: ScmWeights | None = None,
    ) -> tuple[list[NDArray[np.float32]], dict[str, float]]:
        """Return the influence of each utterance, in order, and statistics.

        utterances: B integer arrays (n_b,). labels: (B, K), -1 where a head does not apply.
        estimator, weights: by default those of the settings, and the latest.
        The result has B float32 arrays (n_b,) in [0, 1], zeros where there is nothing to measure (see
        `scoring.effects.effects`).
        Statistics: `utterances`, `distinct`, `cache_hits` (distinct ones scored before), `hit_rate` (share of the
        utterances that needed no scorer), `counterfactuals`, `approximated` (too long for `scm`, so scored by
        `gradient`), `version` (of the SCM), `seconds` (wall), `scorer_seconds` (busy, all scorers), `influence_*` (see
        `influence_statistics`).
        Raises ValueError when the input does not fit the SCM, ScoringError when scorers keep failing.
        """
        started = time.monotonic()
        estimator = estimator or self.settings.estimator
        utterances, labels = self._checked(utterances, labels)
        version, reference = weights or self._current
        first, which = distinct_pairs(utterances, labels)
        # Scores of estimators that use no SCM are valid for every version of it.
        asked = "" if estimator in WITHOUT_SCM or reference is None else reference.hex()
        keys = {row: score_key(estimator, asked, utterances[row], labels[row]) for row in first}
        known = {row: values for row in first if (values := self._cache.get(keys[row])) is not None}
        tasks = cut_into_tasks(
            {row: len(utterances[row]) ** 2 for row in first if row not in known},
            workers=self.settings.workers,
            most=self.settings.batch_utterances,
            most_cost=TASK_TOKENS,
        )
        common = (estimator, version, [reference], self.settings.start_deadline_s)
        results = self._scorers.run(
            [(*common, *flatten([utterances[row] for row in rows]), labels[rows]) for rows in tasks]
        )
        for rows, (joined, _) in zip(tasks, results, strict=True):
            lengths = np.array([len(utterances[row]) for row in rows], dtype=np.int64)
            for row, values in zip(rows, split(joined, lengths), strict=True):
                known[row] = values
                self._cache.put(keys[row], values)
        influence = [known[first[pair]].copy() for pair in which]
        evaluated = sum(len(rows) for rows in tasks)
        statistics = {
            "utterances": len(utterances),
            "distinct": len(first),
            "cache_hits": len(first) - evaluated,
            "hit_rate": 1.0 - evaluated / len(utterances) if len(utterances) else 0.0,
            "counterfactuals": sum(counts["counterfactuals"] for _, counts in results),
            "approximated": sum(counts["approximated"] for _, counts in results),
            "version": version,
            "seconds": time.monotonic() - started,
            "scorer_seconds": sum(counts["seconds"] for _, counts in results),
            **influence_statistics(influence),
        }
        return influence, statistics

    def train(
        self,
        utterances: Sequence[NDArray[np.integer]],
        labels: NDArray[np.integer],
        rounds: int | None = None,
        batch: int = 0,
    ) -> ScmTrainingReport:
        """Train the SCM on new utterances, as `ScmTrainer.train` does; the next `score` uses the new version.

        Raises ValueError when the input does not fit the SCM, ScoringError when the trainer keeps failing.
        """
        utterances, labels = self._checked(utterances, labels)
        what = f"train on {len(utterances)} utterances"
        limit = self.settings.deadline_s
        report = self._ask_trainer("train", what, limit, *flatten(utterances), labels, rounds, batch)
        assert report is not None  # only `snapshot` has none
        return report

    def unscaled(self, weights: ScmWeights) -> ScmWeights:
        """Return the same version of the SCM at temperature 1, for `score`."""
        version, reference = weights
        if reference is None:
            return weights
        arrays = ray.get(reference, timeout=self.settings.start_deadline_s)
        return version, ray.put({**arrays, "temperature": np.ones(())})

    def check(self) -> list[dict[str, float]]:
        """Ping every scorer and replace those that do not answer; waits until all are up.

        Returns each scorer's `pid`, `version`, `utterances` and busy `seconds`, in order.
        """
        return self._scorers.check()

    def trainer_pid(self) -> int:
        """Return the process id of the trainer."""
        return ray.get(self._trainer.pid.remote(), timeout=self.settings.start_deadline_s)

    def last_batch(self) -> int:
        """Return the number of the last batch that the SCM has learned; 0 before the first."""
        return int(self.state()[1].get("last_batch", 0))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the trainer's full state for a checkpoint: (tensors by flat name, facts of JSON types)."""
        if self._state is None:
            raise ScoringError("the scoring pool has no state yet: call start() first")
        arrays, facts = ray.get(self._state, timeout=self.settings.start_deadline_s)
        return {name: torch.tensor(array) for name, array in arrays.items()}, facts

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from what `state` returned. Raises ValueError, and changes nothing, when it is of another SCM."""
        check_shape(facts["settings"], self.settings.scm, self.sizes)
        before = self._state
        self._state, self._trainer_current = ray.put((to_arrays(tensors), dict(facts))), False
        try:
            self._ask_trainer("snapshot", "load its state", self.settings.start_deadline_s)
        except BaseException:
            self._state, self._trainer_current = before, False
            raise

    def close(self) -> None:
        """End all actors, each by its handle; may be called twice."""
        self._scorers.close()
        self._end_trainer()

    def _checked(
        self, utterances: Sequence[NDArray[np.integer]], labels: NDArray[np.integer]
    ) -> tuple[list[NDArray[np.int32]], NDArray[np.int32]]:
        arrays = [np.asarray(ids, dtype=np.int32) for ids in utterances]
        rows: NDArray[np.int32] = np.asarray(labels, dtype=np.int32)
        check_utterances(arrays, rows, vocab_size=self.sizes.vocab_size, head_sizes=self.sizes.head_sizes)
        return arrays, rows

    def _make_scorer(self, index: int) -> Any:
        strategies = self.context.scorer_strategies
        actor = self._actor(Scorer, strategies[index] if strategies else None)
        return actor.remote(self.settings, self.sizes, self.context.tokens, self.context.parser)

    def _ask_trainer(self, method: str, what: str, limit_s: float, *arguments: Any) -> ScmTrainingReport | None:
        """Call a method of the trainer that returns a `TrainerAnswer`, and keep its version, weights and state.

        A trainer that dies or does not answer is replaced; the new one gets the last state, and the same call.
        """
        failures = 0
        while True:
            try:
                if self._trainer is None:
                    self._trainer = self._make_trainer()
                    self._trainer_current = self._state is None
                if not self._trainer_current:
                    ray.get(self._trainer.restore.remote(self._state), timeout=self.settings.start_deadline_s)
                    self._trainer_current = True
                self._trainer.set_waited_for.remote(self.waited_for)
                call = getattr(self._trainer, method).options(num_returns=3)
                answer, weights, state = call.remote(*arguments)
                version, report = self._progressing(answer, limit_s)
            except (*ACTOR_GONE, GetTimeoutError) as error:
                self._end_trainer()
                failures += 1
                how = "did not answer in time" if isinstance(error, TimeoutError) else f"died: {error}"
                story = f"the SCM's trainer, asked to {what} within {limit_s:g} s, {how}"
                if verdict := self._repeated.verdict("SCM's trainer", how):
                    raise ScoringError(verdict) from error
                if self._state is None or failures >= self.context.max_failures:
                    raise ScoringError(f"{story} (failure {failures} in a row)") from error
                logger.warning("%s; replacing it", story)
                self._trainers_replaced += 1
            else:
                self._current, self._state = (version, weights), state
                self._repeated.progressed("SCM's trainer")
                return report

    def _progressing(self, answer: ray.ObjectRef, limit_s: float) -> tuple[int, ScmTrainingReport | None]:
        """The trainer's answer, however long it takes. Raises GetTimeoutError after `limit_s` without a minibatch."""
        poll_s = min(PROGRESS_POLL_S, limit_s / 4)
        last, before = time.monotonic(), None
        while not ray.wait([answer], timeout=poll_s)[0]:
            asked = time.monotonic()
            with suppress(GetTimeoutError, *ACTOR_GONE):
                done = ray.get(self._trainer.progress.remote(), timeout=poll_s)
                if before is not None and done > before:
                    last = asked
                before = done
            if asked - last >= limit_s:
                raise GetTimeoutError(f"no minibatch for {limit_s:g} s")
        return ray.get(answer)

    def _make_trainer(self) -> Any:
        actor = self._actor(ScmTrainerActor, self.context.trainer_strategy)
        return actor.remote(self.settings.scm, self.sizes, seed=self.context.seed, device=self.settings.device)

    def _actor(self, kind: type, strategy: Any) -> Any:
        in_ray: Any = ray.remote  # "watch" gets a thread of its own, which answers during a task
        cpus, gpus = self.context.actor_cpus, self.context.actor_gpus
        return in_ray(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=strategy, concurrency_groups={"watch": 1})(kind)

    def _end_trainer(self) -> None:
        if self._trainer is not None:
            ray.kill(self._trainer)
        self._trainer, self._trainer_current = None, False
