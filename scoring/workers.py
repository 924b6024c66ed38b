"""What runs inside the scoring pool's Ray actors: scorers, and the one trainer of the SCM.

Plain classes: `scoring.pool` makes actors of them. Tensors travel as numpy arrays, which Ray's object store
hands to any number of readers on a machine without a copy.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from scoring.influence import influence
from scoring.scm import ScmSettings, StructuralCausalModel
from scoring.training import ScmTrainer, ScmTrainingReport, ScmTrainingSettings
from scoring.utterances import flatten, split

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}

Arrays = dict[str, NDArray]
TrainerState = tuple[Arrays, dict[str, Any]]
"""`ScmTrainer.state_dict` with arrays for tensors."""
TrainerAnswer = tuple[tuple[int, ScmTrainingReport | None], Arrays, TrainerState]
"""((version, report of the training done), SCM weights, full state): three objects, fetched only by who needs them."""


class Scorer:
    """Scores batches with the weights each batch names; holds one SCM on one device, on one thread."""

    def __init__(
        self,
        scm: ScmSettings,
        countable_by_id: NDArray[np.bool_],
        *,
        null_id: int,
        window: int,
        batch_tokens: int,
        precision: str,
        device: str,
    ) -> None:
        torch.set_num_threads(1)
        self._scm = StructuralCausalModel(scm).to(device, PRECISIONS[precision]).eval()
        self._countable_by_id = countable_by_id
        self._how = {"window": window, "null_id": null_id, "batch_tokens": batch_tokens}
        self._weights_key = ""
        self._version = -1
        self._utterances = 0
        self._seconds = 0.0

    def ping(self) -> dict[str, float]:
        """Say who answers and what it has done: `pid`, `version` (-1: no weights yet), `utterances`, `seconds`."""
        return {
            "pid": os.getpid(),
            "version": self._version,
            "utterances": self._utterances,
            "seconds": self._seconds,
        }

    def score(
        self,
        version: int,
        weights: Sequence[ray.ObjectRef],
        deadline_s: float,
        ids: NDArray[np.int32],
        lengths: NDArray[np.int64],
        labels: NDArray[np.int32],
    ) -> tuple[NDArray[np.float32], int, float]:
        """Return (influence of all tokens end to end (sum n_b,), counterfactuals evaluated, seconds it took).

        weights: one reference to the arrays of SCM version `version`, in a list so that Ray leaves it
        unfetched. It is fetched, within deadline_s, only where it is not what was used last.
        ids, lengths: the utterances as by `flatten`. labels: (B, K).
        """
        started = time.monotonic()
        key = weights[0].hex()
        if key != self._weights_key:
            arrays = ray.get(weights[0], timeout=deadline_s)
            self._scm.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
            self._weights_key, self._version = key, version
        utterances = split(ids, lengths)
        masks = [self._countable_by_id[row] for row in utterances]
        scored = influence(self._scm, utterances, labels, masks, **self._how)
        values, _ = flatten(scored.values)
        seconds = time.monotonic() - started
        self._utterances += len(utterances)
        self._seconds += seconds
        return values, scored.counterfactuals, seconds


class ScmTrainerActor:
    """The one worker that trains the SCM, on one thread, so that training is the same on every run."""

    def __init__(self, scm: ScmSettings, training: ScmTrainingSettings, device: str) -> None:
        torch.set_num_threads(1)
        self._trainer = ScmTrainer(scm, training, device)

    def pid(self) -> int:
        """Return the id of the trainer's process."""
        return os.getpid()

    def restore(self, state: TrainerState) -> None:
        """Go on from a state that `train` or `snapshot` returned."""
        tensors, facts = state
        self._trainer.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()}, facts)

    def snapshot(self) -> TrainerAnswer:
        """Return the present version, weights and state."""
        return self._answer(None)

    def train(
        self,
        ids: NDArray[np.int32],
        lengths: NDArray[np.int64],
        labels: NDArray[np.int32],
        rounds: int | None,
    ) -> TrainerAnswer:
        """Train as `ScmTrainer.train`, on the utterances as by `flatten`; return the version made."""
        return self._answer(self._trainer.train(split(ids, lengths), labels, rounds))

    def _answer(self, report: ScmTrainingReport | None) -> TrainerAnswer:
        tensors, facts = self._trainer.state_dict()
        return (self._trainer.version, report), to_arrays(self._trainer.weights()), (to_arrays(tensors), facts)


def to_arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    """View CPU tensors as numpy arrays of the same names."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}
