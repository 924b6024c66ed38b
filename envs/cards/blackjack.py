"""Blackjack against a dealer, after Gymnasium's Blackjack-v1 (Sutton and Barto, example 5.1) and RL4VLM's gym_cards."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.base import InvalidActionPolicy, TextActionEnv
from envs.cards.art import card_back, card_picture, table
from envs.cards.deck import RANKS, checked_cards, draw_card, rank, rank_name
from envs.drawing import paste
from envs.prompts import answer_format, json_answer

BUST = 21  # more points than this lose
DEALER_STANDS = 17
_CARD, _SMALL_CARD = 70, 35  # pixels wide
_ROW_END = 295
_DEALER_Y, _PLAYER_Y = 25, 150
_LABELS = (("Dealer", 16, (5, 4)), ("Player", 16, (5, 129)))
_SHOWN_CARDS = 4  # number of the player's cards with state labels


def points(cards: Sequence[str]) -> tuple[int, bool]:
    """A hand's points, and whether an ace in it counts as 11 ("soft")."""
    total = sum(min(rank(code), 10) for code in cards)
    soft = total <= BUST - 10 and any(code[1] == "A" for code in cards)
    return total + 10 * soft, soft


def basic_strategy(cards: Sequence[str], dealer_card: str) -> str:
    """The action of greatest expected return for these rules (stand or hit only, infinite deck)."""
    total, soft = points(cards)
    dealer = min(rank(dealer_card), 10)  # 1: an ace
    if soft:
        hit = total <= 17 or (total == 18 and dealer in (1, 9, 10))
    elif total <= 12:
        hit = total < 12 or dealer not in (4, 5, 6)
    else:
        hit = total <= 16 and dealer not in (2, 3, 4, 5, 6)
    return "hit" if hit else "stand"


class Blackjack(TextActionEnv):
    """`coso/Blackjack-v0`: the picture shows the dealer's first card, a hidden one, and all cards of the player.

    The deck is infinite. `hit` draws a card; with more than 21 points the player loses. `stand` ends the turn: the
    dealer draws until 17 points or more (stands on a soft 17), and the higher hand of at most 21 points wins. Reward:
    +1, 0 or -1 at the end, else 0. `natural`: a win with an ace and a ten-valued card as the first two cards pays 1.5.
    `sab`: as in Sutton and Barto's book, such a hand wins unless the dealer has one too, and `natural` is ignored.
    Both are False by default, as in the published game.

    A hand has at most 20 hits, so an episode is truncated only if invalid answers do nothing. State:
    `{"player": ["H5", "D2"], "dealer": ["SJ", "DJ"], "draws": ["S2"]}`. The dealer's first card is visible; `draws`
    are the next cards of the deck, further ones come from `np_random`. `info` holds the player's cards and the
    dealer's first card; a state may hold only these, then the hidden card is drawn.
    """

    action_words = ("stand", "hit")
    state_label_names = ("dealer", "points", "soft", *(f"card {index + 1}" for index in range(_SHOWN_CARDS)))
    state_label_sizes = (10, BUST + 11, 2, *(len(RANKS),) * _SHOWN_CARDS)
    horizon = 21

    def __init__(
        self,
        natural: bool = False,
        sab: bool = False,
        invalid_action: InvalidActionPolicy = "random",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(invalid_action, render_mode)
        self.natural = natural
        self.sab = sab
        self._player: list[str] = []
        self._dealer: list[str] = []
        self._draws: deque[str] = deque()
        self._canvas = np.empty(self.image_shape, np.uint8)

    @property
    def prompt(self) -> str:
        return (
            "The picture shows a game of blackjack: one card of the dealer's and all of yours. Get closer to 21 points "
            "than the dealer, but not over 21. A counts as 1 or 11, J, Q and K as 10. "
            'Action "hit" takes a card, action "stand" ends your turn; the dealer then draws up to 17. '
            + answer_format(
                {"dealer": "x", "player": "x", "thoughts": "count your points, then choose"}, self.action_words
            )
        )

    @property
    def state(self) -> dict[str, Any]:
        return {"player": list(self._player), "dealer": list(self._dealer), "draws": list(self._draws)}

    @property
    def public_state(self) -> dict[str, Any]:
        return {"player": list(self._player), "dealer": self._dealer[:1]}

    def state_labels(self) -> NDArray[np.int32]:
        total, soft = points(self._player)
        ranks = [rank(code) - 1 for code in self._player[:_SHOWN_CARDS]]
        ranks += [-1] * (_SHOWN_CARDS - len(ranks))
        return np.array([min(rank(self._dealer[0]), 10) - 1, total, int(soft), *ranks], np.int32)

    def expert_utterance(self, rng: np.random.Generator, noise: float = 0.0, habit: str = "") -> str:
        best = basic_strategy(self._player, self._dealer[0])
        action = self.with_noise(best, rng, noise, habit)
        total, soft = points(self._player)
        dealer = rank_name(self._dealer[0])
        hand = f"{'soft ' if soft else ''}{total}"
        fields = {
            "dealer": dealer,
            "player": " ".join(rank_name(code) for code in self._player),
            "thoughts": f"I have {hand} and the dealer shows {dealer} the book says {best} so I should {action}",
        }
        return json_answer(fields, action)

    def _set_state(self, state: dict[str, Any] | None) -> None:
        if state is None:
            self._draws = deque()
            self._dealer = [self._draw(), self._draw()]
            self._player = [self._draw(), self._draw()]
        else:
            if not {"player", "dealer"} <= set(state) <= {"player", "dealer", "draws"}:
                raise ValueError(
                    f"a Blackjack state has 'player', 'dealer' and optionally 'draws', not {sorted(map(str, state))}"
                )
            hands = {name: checked_cards(cards, f"Blackjack {name!r}") for name, cards in state.items()}
            if len(hands["player"]) < 2 or points(hands["player"])[0] > BUST:
                raise ValueError(
                    f"Blackjack 'player' must be two cards or more of at most 21 points, not {hands['player']}"
                )
            if len(hands["dealer"]) not in (1, 2):
                raise ValueError(f"Blackjack 'dealer' must be the card shown and the hidden one, not {hands['dealer']}")
            self._player, self._dealer = hands["player"], hands["dealer"]
            self._draws = deque(hands.get("draws", []))
            if len(self._dealer) == 1:
                self._dealer.append(draw_card(self.np_random))
        self._draw_table()

    def _draw(self) -> str:
        return self._draws.popleft() if self._draws else draw_card(self.np_random)

    def _act(self, action: str) -> tuple[float, bool, bool]:
        if not action:
            return 0.0, False, False
        if action == "hit":
            self._player.append(self._draw())
            self._draw_player()
            bust = points(self._player)[0] > BUST
            return (-1.0 if bust else 0.0), bust, False
        while points(self._dealer)[0] < DEALER_STANDS:
            self._dealer.append(self._draw())
        reward = self._settlement()
        return reward, True, reward > 0

    def _settlement(self) -> float:
        """The reward of standing against the dealer's whole hand."""
        player, dealer = points(self._player)[0], points(self._dealer)[0]
        reward = 1.0 if dealer > BUST else float(player > dealer) - float(player < dealer)
        natural = _is_natural(self._player)
        if self.sab and natural and not _is_natural(self._dealer):
            return 1.0
        if self.natural and not self.sab and natural and reward == 1.0:
            return 1.5
        return reward

    def _picture(self) -> NDArray[np.uint8]:
        return self._canvas.copy()

    # The canvas is kept; only the player's row is redrawn.

    def _draw_table(self) -> None:
        self._canvas[:] = table(_LABELS)
        paste(self._canvas, card_picture(self._dealer[0], _CARD), 5, _DEALER_Y)
        paste(self._canvas, card_back(_CARD), 78, _DEALER_Y)
        self._draw_player()

    def _draw_player(self) -> None:
        """Draw up to four cards side by side, up to eight overlapping, and more of them small."""
        self._canvas[_PLAYER_Y:] = table(_LABELS)[_PLAYER_Y:]
        count = len(self._player)
        small = count > 8
        width = _SMALL_CARD if small else _CARD
        step = _SMALL_CARD + 1 if small else min(73, (_ROW_END - 5 - _CARD) // max(1, count - 1))
        for index, code in enumerate(self._player):
            row, column = divmod(index, 8)
            paste(self._canvas, card_picture(code, width), 5 + column * step, _PLAYER_Y + row * 50)


def _is_natural(cards: Sequence[str]) -> bool:
    return len(cards) == 2 and points(cards)[0] == BUST
