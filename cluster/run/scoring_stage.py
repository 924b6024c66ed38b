"""The scoring stage of an update: the SCM learns from a batch, the pool scores it, the parser judges both."""

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
    """Writes influence into batches; one thread at a time.

    In sync mode the SCM learns from a batch first and scores it then. In async mode both go on at once: a batch is
    scored by the SCM that has learnt from the batches before it, once there is one.
    """

    def __init__(self, config: RunConfig, pool: ScoringPool, chat: ChatProcessor) -> None:
        self._overlaps = config.mode == "async"
        self._estimator = config.scoring.estimator
        self._sample = config.scoring.fidelity_utterances
        self._trains = self._estimator not in WITHOUT_SCM or self._sample > 0
        self._pool = pool
        self._chat = chat

    def score(self, batch: TrajectoryBatch) -> tuple[TrajectoryBatch, Metrics]:
        """Return the batch with every token's influence written into it, and what is logged of it."""
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
        """How the SCM's influence agrees with the parser's, and the gradient's with the SCM's, on a few answers."""
        chosen = self._first_distinct(utterances, labels)
        if not chosen:
            return {}
        some, actions = [utterances[row] for row in chosen], labels[chosen]
        countable = [self._pool.context.tokens.countable_by_id[ids] for ids in some]
        scm, _ = self._pool.score(some, actions, "scm", weights)
        gradient, _ = self._pool.score(some, actions, "gradient", weights)
        spans = [span_mass(values, self._chat.action_start(ids)) for ids, values in zip(some, scm, strict=True)]
        row = {
            "fidelity/utterances": len(chosen),
            **{f"fidelity/{name}": value for name, value in mean_of_defined({"action_mass": spans}).items()},
        }
        if "spearman" in (close := agreement(gradient, scm, countable)):
            row["fidelity/gradient_spearman"] = close["spearman"]
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
