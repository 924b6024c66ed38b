"""The keyword parser of the card games: one action word after the last `"action":`."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Protocol

from envs.labels import LabelHead, LabelSpace, ParsedAction

ACTION_MARKER = '"action":'

# Lower-casing only ASCII keeps every character at its offset (str.lower can lengthen a string), so offsets
# found here are offsets into the utterance itself.
_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
# Replaces a found word, so that its neighbours cannot join into another word.
_GAP = "\0"


def action_part_start(utterance: str) -> int:
    """Offset of the first character of the last `"action":` (in any case), or -1 if there is none."""
    return utterance.translate(_ASCII_LOWER).rfind(ACTION_MARKER)


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined, and each half without its other half replaced by U+FFFD.

    JSON can spell such a half ("\\ud83d"). No encoder, file or table takes it.
    """
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Parser(Protocol):
    """Maps an utterance to an action and labels, deterministically."""

    def parse(self, utterance: str) -> ParsedAction:
        """Parse any string; an utterance without an action is invalid, never an exception."""
        ...


class KeywordParser:
    """Finds the one action word that follows the last `"action":`; takes time linear in the utterance.

    Longer words are searched first and removed when found, so that `10` is not also read as `1`.
    Exactly one distinct word is the action; none or several make the utterance invalid.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """`words`: distinct, non-empty, lower-case action words, in the order of their labels."""
        if not words or len(set(words)) != len(words):
            raise ValueError(f"action words must be distinct and at least one, not {list(words)}")
        for word in words:
            if not word or word != word.translate(_ASCII_LOWER) or _GAP in word:
                raise ValueError(f"an action word must be non-empty and in lower case, not {word!r}")
        self.words = tuple(words)
        self.label_space = LabelSpace((LabelHead("action", len(self.words), self.words),))
        self._longest_first = sorted(self.words, key=len, reverse=True)

    def parse(self, utterance: str) -> ParsedAction:
        """The action an utterance names. Accepts any string; a string without an action is invalid."""
        lowered = utterance.translate(_ASCII_LOWER)
        start = lowered.rfind(ACTION_MARKER)
        if start < 0:
            return ParsedAction("", self.label_space.none(), False, len(utterance))
        tail = lowered[start + len(ACTION_MARKER) :]
        found = []
        for word in self._longest_first:
            if word in tail:
                found.append(word)
                tail = tail.replace(word, _GAP)
        if len(found) != 1:
            return ParsedAction("", self.label_space.none(), False, start)
        return ParsedAction(found[0], self.label_space.encode({"action": found[0]}), True, start)
