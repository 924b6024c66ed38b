"""Games that build a formula entry by entry from the numbers on some cards, to reach a target value."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from envs.base import InvalidActionPolicy, TextActionEnv
from envs.cards.art import FELT, card_picture, table
from envs.cards.deck import RANKS, checked_cards, rank, rank_name
from envs.cards.formulas import BLANK, shown, value_of
from envs.cards.solver import complete
from envs.drawing import paste, text_block
from envs.prompts import answer_format, json_answer

EQUALS = "="
SOLVED_REWARD = 10.0
WRONG_REWARD = -1.0
_MARGIN = 5
_ENTRY_GAP = 4


class FormulaGame(TextActionEnv):
    """What EZPoints and Points24 share, after the published rules of RL4VLM's gym_cards.

    Actions: the numbers 1 to 10 (or 13), operators, `=`. `=` ends the episode: +10 if the formula has the value
    `target_points` and uses every card, else -1. A number that is not on a free card costs -1 and appends a blank;
    other entries are appended with reward 0. If the formula has more than `max_entries` entries before the action,
    the episode is truncated with -1, whatever the action. Values are exact (`envs/cards/formulas.py`). After
    `horizon` steps an episode is always truncated. State: `{"cards": ["D3", "HT"]}` and `"formula"`, the list of
    entries so far ("" for a blank).
    """

    operators: ClassVar[tuple[str, ...]]
    card_count: ClassVar[int]
    max_entries: ClassVar[int]
    card_width: ClassVar[int]
    cards_y: ClassVar[int]
    label_xy: ClassVar[tuple[int, int]]
    entries_xy: ClassVar[tuple[int, int]]
    entry_px: ClassVar[int]

    def __init__(
        self,
        target_points: int,
        highest_number: int,
        invalid_action: InvalidActionPolicy = "random",
        render_mode: str | None = None,
    ) -> None:
        if isinstance(target_points, bool) or not isinstance(target_points, int) or target_points < 1:
            raise ValueError(f"target_points must be an integer of at least 1, not {target_points!r}")
        self.numbers = tuple(str(number) for number in range(1, highest_number + 1))
        self.action_words = (*self.numbers, *self.operators, EQUALS)
        self.state_label_names = tuple(f"card {index + 1}" for index in range(self.card_count))
        super().__init__(invalid_action, render_mode)
        self.target_points = target_points
        self.highest_number = highest_number
        self._cards: list[str] = []
        self._formula: list[str] = []
        self._held: list[str] = []  # numbers of the cards that the formula has not used
        self._too_long = False
        self._canvas = np.empty(self.image_shape, np.uint8)
        self._cursor = self.entries_xy

    @abstractmethod
    def _deal(self) -> list[str]:
        """Cards of a new episode, drawn from `np_random`."""

    @property
    def prompt(self) -> str:
        faces = "J, Q and K count as " + ("10" if self.highest_number == 10 else "11, 12 and 13")
        return (
            f"The picture shows {self.card_count} cards. A counts as 1, {faces}. Build a formula that is worth "
            f"{self.target_points} and uses each card once, one entry at a time. "
            f"Formula: {shown(self._formula) or 'empty'} . "
            f"Actions: {' '.join(self.action_words)} ; say = when the formula is complete. "
            + answer_format(
                {"cards": "x", "formula": "x", "thoughts": "plan the formula, then choose its next entry"},
                self.action_words,
            )
        )

    @property
    def state(self) -> dict[str, Any]:
        return {"cards": list(self._cards), "formula": list(self._formula)}

    @property
    def horizon(self) -> int:
        return self.max_entries + 2

    @property
    def state_label_sizes(self) -> tuple[int, ...]:
        return (len(RANKS),) * self.card_count

    def state_labels(self) -> NDArray[np.int32]:
        return np.array([rank(code) - 1 for code in self._cards], np.int32)

    def expert_utterance(self, rng: np.random.Generator, noise: float = 0.0, habit: str = "") -> str:
        way = self.solution()
        rest = (EQUALS,) if way is None else (*way, EQUALS)
        action = self.with_noise(rest[0], rng, noise, habit)
        # The plan continues the formula, so the next entry follows "then".
        makes = f"makes {self.target_points}" if way is not None else f"since nothing makes {self.target_points}"
        fields = {
            "cards": " ".join(rank_name(code) for code in self._cards),
            "formula": shown(self._formula) or "empty",
            "thoughts": f"then {shown(rest)} {makes} so I should say {action}",
        }
        return json_answer(fields, action)

    def solution(self) -> tuple[str, ...] | None:
        """The shortest list of entries that completes the current formula before `=`; None if there is none."""
        operators = "".join(self.operators).replace(")", "")
        numbers = [int(self._number(code)) for code in self._cards]
        # A plan made for the bare cards stays valid while the formula follows it.
        whole = complete((), numbers, self.target_points, operators, self.max_entries)
        begun = tuple(self._formula)
        if whole is not None and whole[: len(begun)] == begun:
            return whole[len(begun) :]
        room = self.max_entries - len(begun)
        return complete(begun, [int(number) for number in self._held], self.target_points, operators, room)

    def _set_state(self, state: dict[str, Any] | None) -> None:
        name = type(self).__name__
        if state is None:
            cards, formula = self._deal(), []
        else:
            if "cards" not in state or set(state) - {"cards", "formula"}:
                raise ValueError(f"a {name} state has 'cards' and optionally 'formula', not {sorted(map(str, state))}")
            cards = checked_cards(state["cards"], f"{name} 'cards'")
            if len(cards) != self.card_count:
                raise ValueError(f"{name} 'cards' must be {self.card_count} cards, not {len(cards)}")
            formula = self._checked_formula(state.get("formula", []), cards)
        self._cards = cards
        self._held = [self._number(code) for code in cards]
        self._formula = []
        self._too_long = False
        self._draw_cards()
        for entry in formula:
            if entry in self._held:
                self._held.remove(entry)
            self._append(entry)

    def _checked_formula(self, formula: Any, cards: list[str]) -> list[str]:
        entries = {*self.numbers, *self.operators, BLANK}
        if not isinstance(formula, list) or any(entry not in entries for entry in formula):
            raise ValueError(f"'formula' must be a list of entries like '3' and '+' ('' for a blank), not {formula!r}")
        if len(formula) > self.max_entries + 1:
            raise ValueError(f"'formula' may have {self.max_entries + 1} entries at most, not {len(formula)}")
        held = [self._number(code) for code in cards]
        for entry in set(formula) & set(self.numbers):
            if formula.count(entry) > held.count(entry):
                raise ValueError(f"'formula' uses {entry} more often than it is on the cards {', '.join(cards)}")
        return formula

    def _number(self, code: str) -> str:
        return str(min(rank(code), self.highest_number))

    def _act(self, action: str) -> tuple[float, bool, bool]:
        if len(self._formula) > self.max_entries:
            self._too_long = True
            return WRONG_REWARD, False, False
        if not action:
            return 0.0, False, False
        if action == EQUALS:
            solved = not self._held and value_of(self._formula) == self.target_points
            return (SOLVED_REWARD if solved else WRONG_REWARD), True, solved
        if action in self.numbers:
            if action not in self._held:
                self._append(BLANK)
                return WRONG_REWARD, False, False
            self._held.remove(action)
        self._append(action)
        return 0.0, False, False

    def _is_cut_off(self) -> bool:
        return self._too_long or super()._is_cut_off()

    def _picture(self) -> NDArray[np.uint8]:
        return self._canvas.copy()

    # The canvas is kept; only the new entries are drawn.

    def _draw_cards(self) -> None:
        self._canvas[:] = table((("Formula:", self.entry_px, self.label_xy),))
        for index, code in enumerate(self._cards):
            x = _MARGIN + int(index * self.card_width * 1.1)
            paste(self._canvas, card_picture(code, self.card_width), x, self.cards_y)
        self._cursor = self.entries_xy

    def _append(self, entry: str) -> None:
        self._formula.append(entry)
        block = text_block(entry or "_", self.entry_px, "white", FELT)
        x, y = self._cursor
        if x + block.shape[1] > self.image_shape[1] - _MARGIN:
            x, y = 2 * _MARGIN, y + len(block)
        paste(self._canvas, block, x, y)
        self._cursor = (x + block.shape[1] + _ENTRY_GAP, y)
