"""Exact interventions: null a window in the text, parse it again, and see whether the action is another one.

No model is asked. A token is nulled by leaving its text out, as the tokenizer decodes the utterance with the
window replaced by the null token, a special token that shows as nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.action_parser import action_parser
from scoring.effects import nulled

LabelParser = Callable[[str], NDArray[np.integer] | None]
"""Text to its action labels, (K,) integers; all -1, or None, where it does not parse."""


@dataclass(frozen=True, kw_only=True)
class ParserSource:
    """What another process needs to parse utterances: the tokenizer, and how to make the parser there.

    make_parser: can be pickled, for instance `functools.partial(environment_parser, "coso/NumberLine-v0", {})`.
    """

    tokenizer: Any
    make_parser: Callable[[], LabelParser]


def environment_parser(environment: str, kwargs: dict[str, Any]) -> LabelParser:
    """Make the parser of an environment; arguments and errors as for `envs.action_parser.action_parser`."""
    parse = action_parser(environment, kwargs)
    return lambda text: parse(text).labels


DECODED_AT_ONCE = 1 << 16
"""Tokens decoded in one call, which bounds the memory for texts."""


class Outcome(IntEnum):
    """What the parser made of a text with a window nulled, beside what it was with it."""

    SAME = 0
    OTHER = 1  # another action
    NONE = 2  # no action any more


class ParserInterventions:
    """Asks a parser about every window of an utterance.

    tokenizer: a Hugging Face tokenizer, the one the ids are of. parse: of the environment.
    window, null_id: as in `scoring.effects`.
    """

    def __init__(self, tokenizer: Any, parse: LabelParser, *, window: int, null_id: int) -> None:
        self._tokenizer = tokenizer
        self._parse = parse
        self._window = window
        self._null_id = null_id
        self._null_is_shown = null_id not in tokenizer.all_special_ids

    def outcomes(
        self, ids: NDArray[np.integer], positions: NDArray[np.integer], labels: NDArray[np.integer]
    ) -> NDArray[np.int8]:
        """Return the `Outcome` of nulling the window at each position: int8 (m,).

        ids: (n,). positions: (m,). labels: (K,) of the action the utterance led to, not all -1.
        """
        wanted = tuple(labels.tolist())
        known: dict[str, Outcome] = {}
        result = np.empty(len(positions), dtype=np.int8)
        at_once = max(1, DECODED_AT_ONCE // max(1, len(ids)))
        for start in range(0, len(positions), at_once):
            some = positions[start : start + at_once]
            for place, text in enumerate(self._texts(ids, some), start):
                if text not in known:
                    known[text] = self._outcome(text, wanted)
                result[place] = known[text]
        return result

    def _texts(self, ids: NDArray[np.integer], positions: NDArray[np.integer]) -> Sequence[str]:
        if self._null_is_shown:  # it would put a text of its own in the window's place
            rows = [np.delete(ids, np.s_[position : position + self._window]) for position in positions]
        else:
            rows = [nulled(ids, int(position), self._window, self._null_id) for position in positions]
        return self._tokenizer.batch_decode(  # type: ignore[no-any-return]
            [row.tolist() for row in rows], skip_special_tokens=True
        )

    def _outcome(self, text: str, wanted: tuple[int, ...]) -> Outcome:
        found = self._parse(text)
        labels = () if found is None else tuple(int(label) for label in found)
        if labels == wanted:
            return Outcome.SAME
        return Outcome.OTHER if any(label >= 0 for label in labels) else Outcome.NONE
