"""NumberLine: move the current number to the target in steps of one, by the published rules of RL4VLM's gym_cards."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.base import InvalidActionPolicy, TextActionEnv
from envs.drawing import text_strip
from envs.prompts import answer_format, json_answer

_FONT_PX = 36
_TARGET_XY = (30, 60)
_CURRENT_XY = (30, 180)
_THOUGHT_WORDS = {"-": "subtract", "+": "add"}


class NumberLine(TextActionEnv):
    """`coso/NumberLine-v0`: the picture shows `Target: g` and `Current: c`, both in 0..max_position.

    Actions: `-` and `+` move the current number by one, not past the ends of the line. Reward: +1 and
    terminated at the target; -1 if the distance did not shrink; else 0. Truncated after 2 * max_position
    steps. Start: both numbers uniform; if equal, target = (target + 1) mod max_position. An invalid
    utterance costs -1 with `invalid_action="penalty"`. State: `{"current": 1, "target": 3}`.
    """

    action_words = ("-", "+")
    image_shape = (300, 300, 3)
    state_label_names = ("current", "target")

    def __init__(
        self,
        max_position: int = 5,
        invalid_action: InvalidActionPolicy = "random",
        render_mode: str | None = None,
    ) -> None:
        """`max_position`: the largest number, at least 2 (with 1, the start rule can start at the target)."""
        if isinstance(max_position, bool) or not isinstance(max_position, int) or max_position < 2:
            raise ValueError(f"max_position must be an integer of at least 2, not {max_position!r}")
        super().__init__(invalid_action, render_mode)
        self.max_position = max_position
        self._current = self._target = 0

    @property
    def prompt(self) -> str:
        return (
            "The picture shows a target number and a current number, each from 0 to "
            f'{self.max_position}. Action "+" adds one to the current number, action "-" subtracts one. '
            "Reach the target in as few actions as you can. "
            + answer_format(
                {"current number": "x", "target number": "x", "thoughts": "compare them and choose"}, self.action_words
            )
        )

    @property
    def state(self) -> dict[str, Any]:
        return {"current": self._current, "target": self._target}

    @property
    def horizon(self) -> int:
        return 2 * self.max_position

    @property
    def state_label_sizes(self) -> tuple[int, ...]:
        return (self.max_position + 1, self.max_position + 1)

    def state_labels(self) -> NDArray[np.int32]:
        return np.array([self._current, self._target], dtype=np.int32)

    def expert_utterance(self, rng: np.random.Generator, noise: float = 0.0, habit: str = "") -> str:
        action = self.with_noise("+" if self._target > self._current else "-", rng, noise, habit)
        thoughts = (
            f"the current number is {self._current} and the target is {self._target} "
            f"so I should {_THOUGHT_WORDS[action]}"
        )
        seen = {"current number": str(self._current), "target number": str(self._target)}
        return json_answer({**seen, "thoughts": thoughts}, action)

    def _set_state(self, state: dict[str, Any] | None) -> None:
        if state is None:
            self._target, self._current = (int(n) for n in self.np_random.integers(self.max_position + 1, size=2))
            if self._target == self._current:
                self._target = (self._target + 1) % self.max_position
            return
        if set(state) != {"current", "target"}:
            raise ValueError(f"a NumberLine state has 'current' and 'target', not {sorted(map(str, state))}")
        for name, value in state.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= self.max_position:
                raise ValueError(f"NumberLine {name!r} must be an integer in 0..{self.max_position}, not {value!r}")
        if state["current"] == state["target"]:
            raise ValueError(f"NumberLine cannot start at its target: current and target are {state['target']}")
        self._current, self._target = state["current"], state["target"]

    def _act(self, action: str) -> tuple[float, bool, bool]:
        if not action:
            return 0.0, False, False
        distance = abs(self._target - self._current)
        move = 1 if action == "+" else -1
        self._current = min(max(self._current + move, 0), self.max_position)
        if self._current == self._target:
            return 1.0, True, True
        return (0.0 if abs(self._target - self._current) < distance else -1.0), False, False

    def _picture(self) -> NDArray[np.uint8]:
        canvas = np.full(self.image_shape, 255, dtype=np.uint8)
        for text, (x, y) in (
            (f"Target: {self._target}", _TARGET_XY),
            (f"Current: {self._current}", _CURRENT_XY),
        ):
            first_row, strip = text_strip(text, x, y, canvas.shape[1], _FONT_PX)
            canvas[first_row : first_row + len(strip)] = strip
        return canvas
