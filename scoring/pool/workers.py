"""The classes of the scoring pool's Ray actors: scorers, and the one trainer of the SCM.

`scoring.pool.scoring_pool` makes actors of them. Tensors are sent as numpy arrays: all readers on a machine share one
copy in Ray's object store.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from scoring.effects.estimators import WITHOUT_SCM, Estimator, make_estimator
from scoring.effects.parser_effects import ParserInterventions, ParserSource
from scoring.effects.tokens import TokenFacts
from scoring.pool.priority import TwoPriorities
from scoring.scm.encoder import in_precision
from scoring.scm.model import StructuralCausalModel
from scoring.scm.shape import ScmSizes
from scoring.scm.training import ScmTrainer, ScmTrainingReport
from scoring.settings import ScmSettings, ScoringSettings
from scoring.utterances import flatten, split

Arrays = dict[str, NDArray]
TrainerState = tuple[Arrays, dict[str, Any]]
"""`ScmTrainer.state_dict` with arrays for tensors."""
TrainerAnswer = tuple[tuple[int, ScmTrainingReport | None], Arrays, TrainerState]
"""((version, training report), SCM weights, full state): three objects, each fetched where it is needed."""


ScorerAnswer = tuple[NDArray[np.float32], dict[str, float]]
"""(influence of a task's utterances, joined, (sum n_b,); counts: `counterfactuals`, `approximated`, `seconds`)"""


class Scorer:
    """Scores tasks with the weights that each task names; holds one SCM on one device, and computes on one core.

    While nobody waits for its scores it takes only cores that would be idle (see `scoring.pool.priority`); an utterance
    that starts after `set_waited_for` obeys it.

    It makes the estimator of the settings at once, so that an error shows when the pool starts; others are made when
    first asked for. parser: None where the environment has none.
    """

    def __init__(
        self, settings: ScoringSettings, sizes: ScmSizes, tokens: TokenFacts, parser: ParserSource | None
    ) -> None:
        torch.set_num_threads(1)
        self._priority = TwoPriorities(settings.device)
        self._scm = in_precision(StructuralCausalModel(settings.scm, sizes).to(settings.device), settings.precision)
        self._scm.requires_grad_(False)
        self._settings = settings
        self._tokens = tokens
        self._parser = parser
        self._interventions: ParserInterventions | None = None
        self._estimators: dict[str, Estimator] = {}
        self._weights_key = ""
        self._version = -1
        self._utterances = 0
        self._seconds = 0.0
        self._estimator(settings.estimator)

    def ping(self) -> dict[str, float]:
        """Return `pid`, `version` (-1: no weights yet), `utterances` (scored so far) and `seconds` (busy so far)."""
        return {
            "pid": os.getpid(),
            "version": self._version,
            "utterances": self._utterances,
            "seconds": self._seconds,
        }

    @ray.method(concurrency_group="watch")
    def set_waited_for(self, waited: bool) -> None:
        """Whether somebody waits for this scorer; answered during a task, too."""
        self._priority.waited_for = waited

    @ray.method(concurrency_group="watch")
    def progress(self) -> int:
        """Return the number of utterances scored so far; answered during a task, too."""
        return self._utterances

    def score(
        self,
        estimator: str,
        version: int,
        weights: Sequence[ray.ObjectRef],
        deadline_s: float,
        ids: NDArray[np.int32],
        lengths: NDArray[np.int64],
        labels: NDArray[np.int32],
    ) -> ScorerAnswer:
        """Score a task.

        estimator: one of `ESTIMATORS`.
        weights: one reference to the arrays of SCM version `version`; it is in a list so that Ray does not fetch it.
            The scorer fetches it, within deadline_s, only if the estimator uses the SCM and the last task had others.
        ids, lengths: the utterances as `flatten` returns them. labels: (B, K).
        """
        started = time.monotonic()
        scorer = self._estimator(estimator)
        if estimator not in WITHOUT_SCM and (key := weights[0].hex()) != self._weights_key:
            arrays = ray.get(weights[0], timeout=deadline_s)
            self._scm.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
            self._weights_key, self._version = key, version
        scored = []
        for row, action in zip(split(ids, lengths), labels, strict=True):
            scored.append(self._priority.run(scorer.score, row, action))
            self._utterances += 1
        seconds = time.monotonic() - started
        self._seconds += seconds
        return flatten([each.values for each in scored])[0], {
            "counterfactuals": sum(each.counterfactuals for each in scored),
            "approximated": sum(each.approximated for each in scored),
            "seconds": seconds,
        }

    def _estimator(self, name: str) -> Estimator:
        if name not in self._estimators:
            if "parser" in name and self._interventions is None and self._parser is not None:
                self._interventions = ParserInterventions(
                    self._parser, window=self._settings.window, null_id=self._tokens.null_id
                )
            self._estimators[name] = make_estimator(
                name, self._tokens, self._settings, scm=self._scm, interventions=self._interventions
            )
        return self._estimators[name]


class ScmTrainerActor:
    """The actor that trains the SCM, on one core, so that training is the same in every run.

    While nobody waits for it, it takes only cores that would be idle (see `scoring.pool.priority`); a minibatch that
    starts after `set_waited_for` obeys it.
    """

    def __init__(self, settings: ScmSettings, sizes: ScmSizes, *, seed: int, device: str) -> None:
        torch.set_num_threads(1)
        self._priority = TwoPriorities(device)
        self._trainer = ScmTrainer(settings, sizes, seed=seed, device=device, run=self._priority.run)

    def pid(self) -> int:
        """Return the id of the trainer's process."""
        return os.getpid()

    @ray.method(concurrency_group="watch")
    def set_waited_for(self, waited: bool) -> None:
        """As `Scorer.set_waited_for`."""
        self._priority.waited_for = waited

    @ray.method(concurrency_group="watch")
    def progress(self) -> int:
        """Return the number of minibatches done so far; answered during a training, too."""
        return self._trainer.done

    def restore(self, state: TrainerState) -> None:
        """Continue from a state that `train` or `snapshot` returned."""
        tensors, facts = state
        self._trainer.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()}, facts)

    def snapshot(self) -> TrainerAnswer:
        """Return the current version, weights and state."""
        return self._answer(None)

    def train(
        self,
        ids: NDArray[np.int32],
        lengths: NDArray[np.int64],
        labels: NDArray[np.int32],
        rounds: int | None,
        batch: int,
    ) -> TrainerAnswer:
        """Train as `ScmTrainer.train` does; ids and lengths as `flatten` returns them."""
        return self._answer(self._trainer.train(split(ids, lengths), labels, rounds, batch))

    def _answer(self, report: ScmTrainingReport | None) -> TrainerAnswer:
        tensors, facts = self._trainer.state_dict()
        return (self._trainer.version, report), to_arrays(self._trainer.weights()), (to_arrays(tensors), facts)


def to_arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    """View CPU tensors as numpy arrays of the same names."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}
