"""Synthetic languages whose causal tokens are known, with a tokenizer of one token per word.

An utterance is a row of slots, each a key and a value: `k0 v3 k1 v0 k2 v5 ...`. A hidden rule reads some of the slots;
their values are the labels of the action. All other values are drawn at random and decide nothing.
"""

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from envs.labels import ParsedAction

VALUES = 6


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Ids are 0 for <pad>, which is special, then the words in their order."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@dataclass(frozen=True)
class Language:
    """slots: number of slots. causal: the slots that the rule reads, one per label head."""

    slots: int
    causal: tuple[int, ...]

    @property
    def words(self) -> list[str]:
        return [f"k{slot}" for slot in range(self.slots)] + [f"v{value}" for value in range(VALUES)]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return word_tokenizer(self.words)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        return (VALUES,) * len(self.causal)

    def sample(self, count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
        """`count` utterances (2 * slots,) and their labels (count, K)."""
        values = np.random.default_rng(seed).integers(0, VALUES, (count, self.slots))
        keys = np.broadcast_to(np.arange(self.slots), values.shape)
        ids = np.stack([1 + keys, 1 + self.slots + values], axis=2).reshape(count, -1)
        return list(ids.astype(np.int32)), values[:, self.causal].astype(np.int32)

    def parse(self, text: str) -> ParsedAction:
        """Return the labels of a text; -1 for a slot whose key or value is missing."""
        words = text.split()
        labels = np.full(len(self.causal), -1, np.int32)
        for head, slot in enumerate(self.causal):
            if f"k{slot}" in words[:-1]:
                value = words[words.index(f"k{slot}") + 1]
                if value.startswith("v"):
                    labels[head] = int(value[1:])
        return ParsedAction(str(labels), labels, bool((labels >= 0).any()))


class FiveBeforeSix:
    """Reads a text of words w1 ... w29: its first label is 1 where w5 comes before w6, else 0."""

    def parse(self, text: str) -> ParsedAction:
        words = text.split()
        ordered = "w5" in words and "w6" in words[words.index("w5") :]
        return ParsedAction("", np.array([int(ordered), -1], np.int32), True)
