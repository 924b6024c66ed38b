"""EZPoints and Points24: make 12 from two cards, 24 from four."""

from __future__ import annotations

from envs.base import InvalidActionPolicy
from envs.cards.deck import card
from envs.cards.formula_game import FormulaGame
from envs.cards.solver import solvable

_FACE_VALUE = 10


class EZPoints(FormulaGame):
    """`coso/EZPoints-v0`: make 12 from two cards with + and *; a formula of more than 5 entries is too long.

    Deal: the first card's rank is uniform in 2…13; its number is min(rank, 10). If the number is 2, 3, 4 or 6, the
    second card's number is 12 / number with probability 1/2; in all other cases it is 12 - number. The order is
    swapped with probability 1/2; suits are uniform. Every deal has a solution for the target 12. Rules:
    `FormulaGame`.
    """

    operators = ("+", "*")
    card_count = 2
    max_entries = 5
    card_width = 135
    cards_y = 55
    label_xy = (10, 256)
    entries_xy = (136, 256)
    entry_px = 24

    def __init__(
        self,
        target_points: int = 12,
        invalid_action: InvalidActionPolicy = "random",
        render_mode: str | None = None,
    ) -> None:
        """`target_points`: the value the formula must have; deals are always made for 12."""
        super().__init__(target_points, _FACE_VALUE, invalid_action, render_mode)

    def _deal(self) -> list[str]:
        rng = self.np_random
        rank = int(rng.integers(2, 14))
        number = min(rank, _FACE_VALUE)
        divides = number in (1, 2, 3, 4, 6)
        partner = 12 // number if divides and rng.random() < 0.5 else 12 - number
        suits = rng.integers(4, size=2)
        cards = [card(rank, int(suits[0])), card(partner, int(suits[1]))]
        return cards[::-1] if rng.random() < 0.5 else cards


class Points24(FormulaGame):
    """`coso/Points24-v0`: make 24 from four cards with + - * / ( ); a formula of more than 20 entries is too long.

    Deal: four ranks uniform in 1…13 and four suits. About a quarter of the deals have no solution; with `solvable_only`
    these are dealt again. See `FormulaGame` for the rules.
    """

    operators = ("+", "-", "*", "/", "(", ")")
    card_count = 4
    max_entries = 20
    card_width = 67
    cards_y = 103
    label_xy = (10, 204)
    entries_xy = (10, 234)
    entry_px = 22

    def __init__(
        self,
        target_points: int = 24,
        treat_face_cards_as_10: bool = True,
        solvable_only: bool = False,
        max_rank: int = 13,
        invalid_action: InvalidActionPolicy = "random",
        render_mode: str | None = None,
    ) -> None:
        """`treat_face_cards_as_10`: else J, Q, K are 11, 12, 13; `max_rank`: highest rank dealt, for easier games."""
        if isinstance(max_rank, bool) or not isinstance(max_rank, int) or not 1 <= max_rank <= 13:
            raise ValueError(f"max_rank must be an integer in 1..13, not {max_rank!r}")
        super().__init__(target_points, _FACE_VALUE if treat_face_cards_as_10 else 13, invalid_action, render_mode)
        self.solvable_only = solvable_only
        self.max_rank = max_rank

    def _deal(self) -> list[str]:
        while True:
            ranks = self.np_random.integers(1, self.max_rank + 1, size=4).tolist()
            if not self.solvable_only or solvable([min(r, self.highest_number) for r in ranks], self.target_points):
                break
        return [card(rank, suit) for rank, suit in zip(ranks, self.np_random.integers(4, size=4).tolist(), strict=True)]
