"""Evaluators that read the result from the page: the embedded phone's state, and MiniWoB++'s own reward."""

from __future__ import annotations

from envs.android.browser import BrowserPhone
from envs.android.evaluators.base import ACCOMPLISHED, NOT_YET, Evaluator, EvaluatorError, Moment, Verdict


class StateEvaluator(Evaluator):
    """`state`: the task's own conditions on the state of the embedded phone."""

    def verdict(self, moment: Moment) -> Verdict:
        if moment.state is None:
            raise EvaluatorError("the evaluator 'state' needs an embedded phone, which reports its state")
        return ACCOMPLISHED if moment.task.succeeded(moment.state) else NOT_YET


class PageEvaluator(Evaluator):
    """MiniWoB++: the page itself reports when it is done and its reward, -1 to 1 (without the time penalty)."""

    def verdict(self, moment: Moment) -> Verdict:
        if not isinstance(moment.device, BrowserPhone):
            raise EvaluatorError("MiniWoB++ pages run in the browser driver only")
        outcome = moment.device.miniwob_outcome()
        reward = float(outcome["reward"]) if outcome["done"] else 0.0
        return Verdict(success=reward > 0, over=bool(outcome["done"]), reward=reward)
