"""Exact interventions: null a window of tokens, parse the text again, and compare the two actions.

This needs no model. To null a window is to leave its text out. Decoding skips a special token, so a special null token
replaces the window before decoding; any other null token would show as text, so the window is deleted instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.parsing import Parser
from scoring.effects.effects import nulled


@dataclass(frozen=True, kw_only=True)
class ParserSource:
    """What another process needs to parse utterances; both can be pickled.

    tokenizer: a Hugging Face tokenizer, the policy's. parser: the environment's.
    """

    tokenizer: Any
    parser: Parser


DECODED_AT_ONCE = 1 << 16
"""Tokens decoded in one call; it bounds the memory for texts."""


class Outcome(IntEnum):
    """The action that the parser reads once a window is nulled, compared with that of the whole text."""

    SAME = 0
    OTHER = 1  # another action
    NONE = 2  # no action


class ParserInterventions:
    """Parses an utterance with each of its windows nulled. window, null_id: as in `scoring.effects.effects`."""

    def __init__(self, source: ParserSource, *, window: int, null_id: int) -> None:
        self._tokenizer = source.tokenizer
        self._parser = source.parser
        self._window = window
        self._null_id = null_id
        self._null_is_shown = null_id not in source.tokenizer.all_special_ids

    def outcomes(self, ids: NDArray[np.integer], positions: NDArray[np.integer]) -> NDArray[np.int8]:
        """Return the `Outcome` of nulling the window at each position: int8 (m,).

        ids: (n,). positions: (m,).
        """
        whole = self._read(self._decoded([ids])[0])
        known: dict[str, Outcome] = {}
        result = np.empty(len(positions), dtype=np.int8)
        at_once = max(1, DECODED_AT_ONCE // max(1, len(ids)))
        for start in range(0, len(positions), at_once):
            rows = [self._without(ids, int(position)) for position in positions[start : start + at_once]]
            for place, text in enumerate(self._decoded(rows), start):
                if text not in known:
                    read = self._read(text)
                    changed = Outcome.OTHER if any(label >= 0 for label in read) else Outcome.NONE
                    known[text] = Outcome.SAME if read == whole else changed
                result[place] = known[text]
        return result

    def _without(self, ids: NDArray[np.integer], position: int) -> NDArray[np.integer]:
        if self._null_is_shown:  # decoding would show the null token's own text in the window's place
            return np.delete(ids, np.s_[position : position + self._window])
        return nulled(ids, position, self._window, self._null_id)

    def _decoded(self, rows: Sequence[NDArray[np.integer]]) -> list[str]:
        """Return the rows' texts as the environment receives them."""
        return self._tokenizer.batch_decode(  # type: ignore[no-any-return]
            [row.tolist() for row in rows], skip_special_tokens=True
        )

    def _read(self, text: str) -> tuple[int, ...]:
        return tuple(self._parser.parse(text).labels.tolist())
