"""The scoring stage of an update: the SCM learns from a batch, the pool scores it, the parser checks the scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from actors.chat import ChatProcessor
from actors.trajectory import TrajectoryBatch
from cluster.config.run_config import RunConfig
from cluster.demonstrations.warm_start import read_demonstrations
from cluster.errors import CosoError
from cluster.launch.ray_runtime import scoring_gpus
from cluster.launch.reservation import Reservation
from envs.parsing import Parser
from scoring.effects.estimators import WITHOUT_SCM
from scoring.effects.parser_effects import ParserSource
from scoring.effects.tokens import token_facts
from scoring.fidelity import agreement, mean_of_defined, span_mass
from scoring.pool.scoring_pool import ScmWeights, ScoringContext, ScoringPool
from scoring.scm.training import ScmTrainingReport

Metrics = dict[str, float]
Utterances = Sequence[np.ndarray]


class ScoringStage:
    """Writes influence into batches. Not thread-safe.

    In sync mode the SCM first learns from a batch and then scores it. In async mode both happen at once: the SCM that
    scores a batch has learnt from the batches before it. Only for the first batch, scoring waits for the training.
    """

    def __init__(self, config: RunConfig, pool: ScoringPool, chat: ChatProcessor) -> None:
        self._overlaps = config.mode == "async"
        self._estimator = config.scoring.estimator
        self._sample = config.scoring.fidelity_utterances
        self._scales = config.scoring.scm.temperature_scaling
        self._trains = self._estimator not in WITHOUT_SCM or self._sample > 0
        self._pool = pool
        self._chat = chat

    def score(self, batch: TrajectoryBatch, update: int = 0, replayed: bool = False) -> tuple[TrajectoryBatch, Metrics]:
        """Return the batch with the influence of every token, and metrics.

        update: the batch's number; 0 if it has none. replayed: whether it comes from the run's log. The SCM may have
        learned such a batch already, since in async mode it learns while the learner still trains on the batch before;
        it does not learn it again.
        """
        utterances = batch.ragged("response_ids", np.int32)
        labels = np.stack(batch.ragged("action_labels", np.int32))
        self._pool.check()
        row: Metrics = {}
        with ThreadPoolExecutor(1, thread_name_prefix="scm") as beside:
            training = beside.submit(self._train, utterances, labels, update, replayed)
            if not self._overlaps or self._pool.version == 0:
                row |= training.result()
            weights = self._pool.weights
            influence, statistics = self._pool.score(utterances, labels, weights=weights)
            row |= self._fidelity(utterances, labels, batch.steps["action_start"].to_pylist(), weights)
            row |= training.result()
        row["time/scorers_busy"] = statistics.pop("scorer_seconds")
        row["cache/hits"] = statistics.pop("cache_hits")
        row |= {f"cache/{name}": statistics.pop(name) for name in ("hit_rate", "counterfactuals")}
        del statistics["seconds"]
        for name, value in statistics.items():
            group, separator, rest = name.partition("influence_")
            row[f"influence/{rest}" if separator and not group else f"scoring/{name}"] = value
        return batch.with_influence(influence), row

    def _train(self, utterances: Utterances, labels: np.ndarray, update: int, replayed: bool) -> Metrics:
        if not self._trains or (replayed and update <= self._pool.last_batch()):
            return {}
        report: ScmTrainingReport = self._pool.train(utterances, labels, batch=update)
        return {f"scm/{name}": value for name, value in report.metrics.items()}

    def _fidelity(
        self, utterances: Utterances, labels: np.ndarray, action_starts: Sequence[int | None], weights: ScmWeights
    ) -> Metrics:
        """Agreement of the SCM's influence with the parser's, and of the gradient's with the SCM's, on some answers."""
        chosen = self._first_distinct(utterances, labels)
        if not chosen:
            return {}
        some, actions = [utterances[row] for row in chosen], labels[chosen]
        countable = [self._pool.context.tokens.countable_by_id[ids] for ids in some]
        scm, _ = self._pool.score(some, actions, "scm", weights)
        gradient, _ = self._pool.score(some, actions, "gradient", weights)
        starts = [self._chat.action_start(utterances[row], action_starts[row]) for row in chosen]
        spans = [span_mass(values, start) for values, start in zip(scm, starts, strict=True)]
        row = {
            "fidelity/utterances": len(chosen),
            **{f"fidelity/{name}": value for name, value in mean_of_defined({"action_mass": spans}).items()},
        }
        if "spearman" in (close := agreement(gradient, scm, countable)):
            row["fidelity/gradient_spearman"] = close["spearman"]
        if self._scales:
            unscaled, _ = self._pool.score(some, actions, "scm", self._pool.unscaled(weights))
            changes = [np.abs(one - other)[can] for one, other, can in zip(scm, unscaled, countable, strict=True)]
            row["fidelity/temperature_change"] = float(np.concatenate(changes).mean())
        if self._pool.context.parser is not None:
            exact, _ = self._pool.score(some, actions, "parser", weights)
            row |= {f"fidelity/{name}": value for name, value in agreement(scm, exact, countable).items()}
        return row

    def _first_distinct(self, utterances: Utterances, labels: np.ndarray) -> list[int]:
        """Rows of the batch's first distinct answers that parsed."""
        rows: dict[bytes, int] = {}
        for row, (ids, action) in enumerate(zip(utterances, labels, strict=True)):
            if len(rows) < self._sample and len(ids) and (action >= 0).any():
                rows.setdefault(ids.tobytes(), row)
        return list(rows.values())


def make_scoring_pool(
    config: RunConfig,
    chat: ChatProcessor,
    head_sizes: tuple[int, ...],
    parser: Parser | None,
    places: Reservation | None = None,
) -> ScoringPool:
    """Make the run's pool, not started yet. Raises `CosoError` where the tokenizer has no null token.

    head_sizes: of the environment's label space. parser: the environment's, or None. places: where its actors run; None
    leaves that to Ray.
    """
    # The model may have logits for more ids than the tokenizer has tokens.
    vocabulary = max(int(chat.config.get_text_config().vocab_size), len(chat.tokenizer))
    try:
        tokens = token_facts(chat.tokenizer, vocabulary, config.scoring.null_token)
    except ValueError as error:
        raise CosoError(str(error)) from None
    context = ScoringContext(
        tokens=tokens,
        head_sizes=head_sizes,
        parser=None if parser is None else ParserSource(tokenizer=chat.tokenizer, parser=parser),
        seed=config.seed,
        actor_cpus=config.cluster.scorer_cpus,
        actor_gpus=scoring_gpus(config),
        max_failures=config.cluster.max_recoveries + 1,
        **({} if places is None else _strategies(config, places)),
    )
    return ScoringPool(config.scoring, context)


def _strategies(config: RunConfig, places: Reservation) -> dict[str, Any]:
    return {
        "trainer_strategy": places.strategy("SCM trainer"),
        "scorer_strategies": [places.strategy("scorer", index) for index in range(config.scoring.workers)],
    }


def pretrain_scm(config: RunConfig, pool: ScoringPool) -> None:
    """Train the SCM on the demonstrations of the run's model, where there are any."""
    if shown := read_demonstrations(config.model.path):
        utterances = shown.ragged("response_ids", np.int32)
        labels = np.stack(shown.ragged("action_labels", np.int32))
        pool.train(utterances, labels, rounds=config.scoring.scm.pretrain_rounds)


def save_scm(pool: ScoringPool, folder: Path) -> None:
    """Write the SCM trainer's whole state: tensors as safetensors, facts as JSON."""
    tensors, facts = pool.state()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "scm.safetensors")
    (folder / "scm.json").write_text(json.dumps(facts), encoding="utf-8")


def load_scm(pool: ScoringPool, folder: Path) -> None:
    """Continue from what `save_scm` wrote. Raises `CosoError` where it is of an SCM of another shape."""
    facts = json.loads((folder / "scm.json").read_text(encoding="utf-8"))
    try:
        pool.load(load_file(folder / "scm.safetensors"), facts)
    except ValueError as error:
        raise CosoError(str(error)) from None
