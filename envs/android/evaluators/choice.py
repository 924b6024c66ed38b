"""The evaluators by name, and which one a task set is judged by unless told otherwise."""

from __future__ import annotations

from typing import Any, Literal

from envs.android.evaluators.base import Evaluator
from envs.android.evaluators.state import PageEvaluator, StateEvaluator
from envs.android.task_sets import EMBEDDED

EvaluatorName = Literal["state", "judge", "adb"]


def make_evaluator(name: str | None, tasks: str, options: dict[str, Any]) -> Evaluator:
    """The evaluator of that name for a task set. Raises ValueError where the two do not fit."""
    if tasks == "miniwob":
        if name is not None:
            raise ValueError(f"MiniWoB++ pages judge themselves; leave evaluator empty instead of {name!r}")
        return PageEvaluator()
    if name is None:
        name = "state" if tasks in EMBEDDED else "judge"
    if name == "state":
        if tasks not in EMBEDDED:
            raise ValueError("the evaluator 'state' reads the embedded phone; tasks from a file need 'judge' or 'adb'")
        return StateEvaluator(**options)
    if name == "judge":
        from envs.android.evaluators.judge import JudgeEvaluator

        return JudgeEvaluator(**options)
    if name == "adb":
        from envs.android.evaluators.adb_checks import AdbEvaluator

        return AdbEvaluator(**options)
    raise ValueError(f"evaluator must be state, judge or adb, not {name!r}")
