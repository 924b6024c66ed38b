"""The evaluators by name, and the default evaluator of each task set."""

from __future__ import annotations

from typing import Any

from envs.android.drivers import load
from envs.android.evaluators.base import Evaluator
from envs.android.evaluators.state import PageEvaluator
from envs.android.task_sets import EMBEDDED

EVALUATORS = {
    "state": "envs.android.evaluators.state:StateEvaluator",
    "judge": "envs.android.evaluators.judge:JudgeEvaluator",
    "adb": "envs.android.evaluators.adb_checks:AdbEvaluator",
}


def make_evaluator(name: str | None, tasks: str, options: dict[str, Any]) -> Evaluator:
    """The evaluator of that name (or `module:Class`) for a task set, with its keyword arguments.

    Raises ValueError if there is no such evaluator or it does not fit the tasks.
    """
    if tasks == "miniwob":
        if name is not None:
            raise ValueError(f"MiniWoB++ pages give their own reward; leave evaluator empty instead of {name!r}")
        return PageEvaluator()
    if name is None:
        name = "state" if tasks in EMBEDDED else "judge"
    if name == "state" and tasks not in EMBEDDED:
        raise ValueError("the evaluator 'state' reads the embedded phone; tasks from a file need 'judge' or 'adb'")
    return load(EVALUATORS.get(name, name), "evaluator", EVALUATORS)(**options)
