"""The interface of evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from envs.android.device import Device
from envs.android.tasks import Task


class EvaluatorError(Exception):
    """An evaluator could not decide whether a task is done. The message says what failed and where."""


@dataclass(frozen=True)
class Moment:
    """The situation of an episode after a step.

    screens: every screen of the episode so far, uint8 (height, width, 3), the current one last; state: of the
    embedded phone, or None; device: the phone itself.
    """

    task: Task
    screens: Sequence[NDArray[np.uint8]]
    state: dict[str, Any] | None
    device: Device


@dataclass(frozen=True)
class Verdict:
    """Whether the task is accomplished, whether the episode is over, and the reward."""

    success: bool
    over: bool
    reward: float


NOT_YET = Verdict(success=False, over=False, reward=0.0)
ACCOMPLISHED = Verdict(success=True, over=True, reward=1.0)


class Evaluator(Protocol):
    """Evaluates every step of an episode."""

    def verdict(self, moment: Moment) -> Verdict:
        """Evaluate this moment. Raises `EvaluatorError` if it cannot be evaluated."""
