"""Evaluators decide whether a phone task is done: by the embedded phone's state, a judge model, or device checks.

An evaluator that fails raises `EvaluatorError`. This is an infrastructure failure: it ends the episode with a reason
and is never a reward of 0.
"""

from envs.android.evaluators.base import Evaluator, EvaluatorError, Moment, Verdict
from envs.android.evaluators.state import PageEvaluator, StateEvaluator

__all__ = ["Evaluator", "EvaluatorError", "Moment", "PageEvaluator", "StateEvaluator", "Verdict"]
