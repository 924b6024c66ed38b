"""Who says whether a phone task is done: the embedded phone's state, a judging model, or checks on a real device.

An evaluator that fails raises `EvaluatorError`. That is a failure of infrastructure: it ends the episode with a reason
and is never a reward of 0.
"""

from envs.android.evaluators.base import Evaluator, EvaluatorError, Moment, Verdict
from envs.android.evaluators.state import PageEvaluator, StateEvaluator

__all__ = ["Evaluator", "EvaluatorError", "Moment", "PageEvaluator", "StateEvaluator", "Verdict"]
