"""NumberLine as a task of one answer: is it the action that leads to the target?

Importing this module registers `coso-bench/OneStepNumberLine-v0` (`environment.id=benchmarks.one_step:…`).
"""

from __future__ import annotations

from itertools import permutations
from typing import Any, ClassVar

import gymnasium

from envs.cards.number_line import NumberLine

ID = "coso-bench/OneStepNumberLine-v0"
#: What is asked: 24 of the 30 pictures.
STATES = [{"current": current, "target": target} for current, target in permutations(range(6), 2)][:24]


def right_action(state: dict[str, int]) -> str:
    """`+` or `-`."""
    return "+" if state["target"] > state["current"] else "-"


class OneStepNumberLine(NumberLine):
    """One of `STATES`; reward 1 for the action that leads to the target, else 0; terminated after one answer."""

    invalid_penalty: ClassVar[float] = 0.0

    def _set_state(self, state: dict[str, Any] | None) -> None:
        super()._set_state(STATES[int(self.np_random.integers(len(STATES)))] if state is None else state)

    def _act(self, action: str) -> tuple[float, bool, bool]:
        right = action == right_action(self.state)
        return float(right), True, right


if ID not in gymnasium.registry:
    gymnasium.register(ID, entry_point="benchmarks.one_step:OneStepNumberLine", kwargs={"invalid_action": "penalty"})
