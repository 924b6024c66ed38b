"""An evaluator of one's own: a task is done when its checks hold in the state of the embedded phone."""

from envs.android.browser import BrowserPhone
from envs.android.evaluators import Evaluator, EvaluatorError, Moment, Verdict
from envs.android.tasks import Check


class StateChecks(Evaluator):
    """Reads the checks of a task file: `{path: settings.dark_mode, operator: equals, value: true}`."""

    def verdict(self, moment: Moment) -> Verdict:
        name, phone = moment.task.name, moment.device
        if not isinstance(phone, BrowserPhone):
            raise EvaluatorError(f"{name}: these checks need the embedded phone (driver browser)")
        try:
            checks = [Check(**check) for check in moment.task.device_checks]
        except TypeError as error:
            raise EvaluatorError(f"{name}: a check has a path, an operator and a value: {error}") from error
        if not checks:
            raise EvaluatorError(f"{name} has no checks; write them into the task file")
        state = phone.inspect()["state"]
        done = all(check.holds(state) for check in checks)
        return Verdict(success=done, over=done, reward=float(done))
