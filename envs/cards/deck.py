"""Playing cards as two letters: a suit (C, D, H, S), then a rank (A, 2…9, T, J, Q, K). `"HT"` is the ten of hearts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SUITS = "CDHS"
RANKS = "A23456789TJQK"


def card(rank: int, suit: int) -> str:
    """The card of a rank 1…13 (1 is the ace) and a suit 0…3."""
    return SUITS[suit] + RANKS[rank - 1]


def rank(code: str) -> int:
    """1…13 of a card; 1 is the ace, 11 to 13 are jack, queen and king."""
    return RANKS.index(code[1]) + 1


def rank_name(code: str) -> str:
    """The rank as printed on a card: A, 2…10, J, Q, K."""
    return "10" if code[1] == "T" else code[1]


def draw_card(rng: np.random.Generator) -> str:
    """A card of an infinite deck: all 52 equally likely."""
    return ALL_CARDS[int(rng.integers(52))]


def checked_cards(cards: Any, what: str) -> list[str]:
    """Check and copy a list of cards from a state. Raises ValueError that names `what` if it is not a list of cards."""
    if not isinstance(cards, Sequence) or isinstance(cards, str):
        raise ValueError(f"{what} must be a list of cards such as 'D3', not {cards!r}")
    for code in cards:
        if code not in _EVERY:
            raise ValueError(f"{what} has {code!r}, which is not a card: a suit of {SUITS}, then a rank of {RANKS}")
    return list(cards)


ALL_CARDS = tuple(suit + name for suit in SUITS for name in RANKS)
_EVERY = frozenset(ALL_CARDS)
