"""The scoring stage of an update: train the SCM on the batch, score the batch, compare with the parser's scores."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from actors.chat import ChatProcessor
from actors.trajectory import TrajectoryBatch
from cluster.config.run_config import RunConfig
from scoring.effects.estimators import WITHOUT_SCM
from scoring.fidelity import agreement, mean_of_defined, span_mass
from scoring.pool.scoring_pool import ScmWeights, ScoringPool
from scoring.scm.training import ScmTrainingReport

Metrics = dict[str, float]
Utterances = Sequence[np.ndarray]


class ScoringStage:
    """Writes influence into batches. Not thread-safe.

    In sync mode the SCM first trains on a batch and then scores it. In async mode both run at the same time: the SCM
    trained on the previous batches scores the batch. The first batch is always trained on first.
    """

    def __init__(self, config: RunConfig, pool: ScoringPool, chat: ChatProcessor) -> None:
        self._overlaps = config.mode == "async"
        self._estimator = config.scoring.estimator
        self._sample = config.scoring.fidelity_utterances
        self._trains = self._estimator not in WITHOUT_SCM or self._sample > 0
        self._pool = pool
        self._chat = chat

    def score(self, batch: TrajectoryBatch) -> tuple[TrajectoryBatch, Metrics]:
        """Return the batch with the influence of every token, and metrics."""
        utterances = batch.ragged("response_ids", np.int32)
        labels = np.stack(batch.ragged("action_labels", np.int32))
        self._pool.check()
        row: Metrics = {}
        with ThreadPoolExecutor(1, thread_name_prefix="scm") as beside:
            training = beside.submit(self._train, utterances, labels)
            if not self._overlaps or self._pool.version == 0:
                row |= training.result()
            weights = self._pool.weights
            influence, statistics = self._pool.score(utterances, labels, weights=weights)
            row |= self._fidelity(utterances, labels, weights)
            row |= training.result()
        row["time/scorers_busy"] = statistics.pop("scorer_seconds")
        row["cache/hits"] = statistics.pop("cache_hits")
        row |= {f"cache/{name}": statistics.pop(name) for name in ("hit_rate", "counterfactuals")}
        del statistics["seconds"]
        for name, value in statistics.items():
            group, separator, rest = name.partition("influence_")
            row[f"influence/{rest}" if separator and not group else f"scoring/{name}"] = value
        return batch.with_influence(influence), row

    def _train(self, utterances: Utterances, labels: np.ndarray) -> Metrics:
        if not self._trains:
            return {}
        report: ScmTrainingReport = self._pool.train(utterances, labels)
        return {f"scm/{name}": value for name, value in report.metrics.items()}

    def _fidelity(self, utterances: Utterances, labels: np.ndarray, weights: ScmWeights) -> Metrics:
        """Agreement of the SCM's influence with the parser's, and of the gradient's with the SCM's, on some answers."""
        chosen = self._first_distinct(utterances, labels)
        if not chosen:
            return {}
        some, actions = [utterances[row] for row in chosen], labels[chosen]
        countable = [self._pool.tokens.countable_by_id[ids] for ids in some]
        scm, _ = self._pool.score(some, actions, "scm", weights)
        gradient, _ = self._pool.score(some, actions, "gradient", weights)
        spans = [span_mass(values, self._chat.action_start(ids)) for ids, values in zip(some, scm, strict=True)]
        row = {
            "fidelity/utterances": len(chosen),
            **{f"fidelity/{name}": value for name, value in mean_of_defined({"action_mass": spans}).items()},
        }
        if "spearman" in (close := agreement(gradient, scm, countable)):
            row["fidelity/gradient_spearman"] = close["spearman"]
        if self._pool.parser is not None:
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
