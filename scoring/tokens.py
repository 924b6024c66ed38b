"""Which tokens can have influence, and which one stands for nothing: asked of the tokenizer, once per run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BARE_PUNCTUATION = frozenset("\"',.:;!?()[]{}`")
"""Characters that carry no part of an action by themselves: the frame of JSON and of a sentence.

The method gives bare punctuation no influence. The signs + - * / = < > are left out of this set: in the
card games they are the actions, and a rule that calls every non-alphanumeric token punctuation would take
the influence from the one token that decides. Other symbols count for the same reason. A token that joins
an action to its frame (such as ` "+"`) is not bare and counts.
"""


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """What scoring must know of a tokenizer, as plain values, so that no scoring worker needs the tokenizer.

    vocab_size: number of token ids the policy can sample.
    countable_by_id: bool (vocab_size,), read-only; True for ids that can have influence.
    null_id: the id that replaces a nulled token.
    """

    vocab_size: int
    countable_by_id: NDArray[np.bool_]
    null_id: int


def countable_token_mask(tokenizer: Any, ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.bool_]:
    """Tell for each id whether it can have influence: bool (n,).

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


def token_facts(tokenizer: Any, vocab_size: int | None = None) -> TokenFacts:
    """Collect the facts of a tokenizer.

    The null token is the padding token, or the unknown token where there is none, or the end token: a token
    that the policy never, or hardly ever, writes inside an utterance.

    vocab_size: the number of ids the model has logits for, where that is more than the tokenizer has tokens.
    Raises ValueError when the tokenizer has none of the three tokens.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    null_id = next((i for i in candidates if i is not None), None)
    if null_id is None:
        raise ValueError("the tokenizer has no padding, unknown or end token to null tokens by: give it a pad_token")
    size = max(len(tokenizer), null_id + 1, vocab_size or 0)
    countable = countable_token_mask(tokenizer, np.arange(size))
    countable.setflags(write=False)
    return TokenFacts(vocab_size=size, countable_by_id=countable, null_id=int(null_id))


def _is_bare(text: str) -> bool:
    return all(character in BARE_PUNCTUATION or character.isspace() for character in text)
