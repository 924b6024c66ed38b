"""The published scoring procedure, written directly: the reference of `benchmarks/scoring.py`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from scoring.effects.effects import normalised
from scoring.effects.tokens import TokenFacts
from scoring.scm.model import StructuralCausalModel

POSITIONS_AT_ONCE = 64

Ids = list[NDArray[np.int32]]


class Published:
    """The published procedure. pad: "call" pads to the call's longest utterance, "batch" to the longest of 64 rows."""

    def __init__(self, scm: StructuralCausalModel, tokens: TokenFacts, window: int, pad: str) -> None:
        self._scm = scm.eval()
        self._tokens = tokens
        self._window = window
        self._pad = pad

    @torch.no_grad()
    def score(self, utterances: Ids, labels: NDArray[np.int32]) -> tuple[Ids, list[NDArray[np.float64]]]:
        """Influence and effects of all tokens of a call's utterances."""
        rows = [(index, position) for index, ids in enumerate(utterances) for position in range(-1, len(ids))]
        longest = max(len(ids) for ids in utterances)
        probabilities: list[float] = []
        for start in range(0, len(rows), POSITIONS_AT_ONCE):
            batch = rows[start : start + POSITIONS_AT_ONCE]
            width = longest if self._pad == "call" else max(len(utterances[index]) for index, _ in batch)
            padded = np.zeros((len(batch), width), np.int64)
            for row, (index, position) in enumerate(batch):
                padded[row, : len(utterances[index])] = utterances[index]
                if position >= 0:
                    padded[row, position : min(position + self._window, len(utterances[index]))] = self._tokens.null_id
            lengths = torch.tensor([len(utterances[index]) for index, _ in batch])
            wanted = torch.from_numpy(labels[[index for index, _ in batch]].astype(np.int64))
            # p - 1, as in the pool: p in float32 would lose small effects.
            logs = self._scm.action_log_probability(torch.from_numpy(padded), lengths, wanted)
            probabilities += torch.expm1(logs).double().tolist()
        values, effects, done = [], [], 0
        for ids in utterances:
            of_utterance = np.array(probabilities[done : done + len(ids) + 1])
            done += len(ids) + 1
            effect = np.abs(of_utterance[1:] - of_utterance[0])
            effect[~self._tokens.countable_by_id[ids]] = 0.0
            effects.append(effect)
            values.append(normalised(effect))
        return values, effects
