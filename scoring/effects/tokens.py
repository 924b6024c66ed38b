"""Which tokens can have influence, and which one replaces a nulled token. The tokenizer is asked once per run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BARE_PUNCTUATION = frozenset("\"',.:;!?()[]{}`")
"""Characters that are no part of an action by themselves: the punctuation of JSON and of sentences.

The method gives bare punctuation no influence. The signs + - * / = < > are not in this set, because they are the
actions of the card games. A rule that calls every non-alphanumeric token punctuation would take the influence
from the one token that decides. Other symbols count for the same reason. A token that contains more than
punctuation (such as ` "+"`) counts.
"""


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """What scoring needs to know about a tokenizer, as plain values: a scorer needs no tokenizer, unless it parses.

    vocab_size: number of token ids the policy can sample.
    countable_by_id: bool (vocab_size,), read-only; True for ids that can have influence.
    null_id: the id that replaces a nulled token.
    """

    vocab_size: int
    countable_by_id: NDArray[np.bool_]
    null_id: int


def countable_token_mask(tokenizer: Any, ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return for each id whether it can have influence: bool (n,).

    Special tokens, bare punctuation, whitespace, and ids that decode to nothing (vocabularies are often
    padded) cannot.

    tokenizer: a Hugging Face tokenizer. ids: n token ids.
    """
    special = set(tokenizer.all_special_ids)
    special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    known = len(tokenizer)
    wanted = [int(i) for i in ids]
    decodable = [[i] for i in wanted if i < known]
    texts = iter(tokenizer.batch_decode(decodable, clean_up_tokenization_spaces=False))
    bare = [_is_bare(next(texts)) if i < known else True for i in wanted]
    return np.array([not (b or i in special) for i, b in zip(wanted, bare, strict=True)], dtype=bool)


def token_facts(tokenizer: Any, vocab_size: int | None = None, null_token: str | None = None) -> TokenFacts:
    """Collect the facts of a tokenizer.

    vocab_size: the number of ids the model has logits for, where that is more than the tokenizer has tokens.
    null_token: a token as the vocabulary spells it. By default it is the padding token, else the unknown token, else
        the end token: the policy hardly ever writes one of these inside an utterance.
    Raises ValueError when the tokenizer has no such token, or none of the three.
    """
    null_id = _null_id(tokenizer, null_token)
    size = max(len(tokenizer), null_id + 1, vocab_size or 0)
    countable = countable_token_mask(tokenizer, np.arange(size))
    countable.setflags(write=False)
    return TokenFacts(vocab_size=size, countable_by_id=countable, null_id=null_id)


def _null_id(tokenizer: Any, null_token: str | None) -> int:
    if null_token is not None:
        found = tokenizer.get_vocab().get(null_token)
        if found is None:
            raise ValueError(f"scoring.null_token {null_token!r} is not in the tokenizer's vocabulary")
        return int(found)
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise ValueError(
        "the tokenizer has no padding, unknown or end token that could replace a nulled one: give it a pad_token, or "
        "name a token in scoring.null_token"
    )


def _is_bare(text: str) -> bool:
    return all(character in BARE_PUNCTUATION or character.isspace() for character in text)
