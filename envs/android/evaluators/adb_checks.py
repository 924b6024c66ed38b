"""`adb`: checks on a real device through adb: the foreground activity, an installed package, a setting."""

from __future__ import annotations

import re
import reprlib
from typing import Any

from envs.android.adb import AdbPhone
from envs.android.device import DeviceError
from envs.android.evaluators.base import ACCOMPLISHED, NOT_YET, Evaluator, EvaluatorError, Moment, Verdict

#: Names that may go to the device's shell: the characters of Android's own names.
_NAME = re.compile(r"[A-Za-z0-9_.$/-]{1,200}")
_NAMESPACES = ("system", "secure", "global")
#: The foreground activity in the output of `dumpsys`, in the forms of Android 8 and later.
_RESUMED = re.compile(r"(?:topResumedActivity|ResumedActivity|mResumedActivity)[=:]\s?ActivityRecord\{\S+ \S+ (\S+)")
_KINDS = {"activity": {"activity"}, "package": {"package"}, "setting": {"setting", "value"}}


class AdbEvaluator(Evaluator):
    """A task succeeds when all its checks from the YAML task file hold.

    `{activity: com.android.settings/.Settings}`: the foreground activity; the part after the slash is optional.
    `{package: org.example.app}`: the package is installed; with `absent: true`, it is not. `{setting:
    global/airplane_mode_on, value: "1"}`: a system, secure or global setting has this value.
    """

    def verdict(self, moment: Moment) -> Verdict:
        if not isinstance(moment.device, AdbPhone):
            raise EvaluatorError("the evaluator 'adb' needs the driver 'adb'")
        if not moment.task.device_checks:
            raise EvaluatorError(f"task {moment.task.name} has no checks; write them into its YAML file")
        try:
            done = all(_holds(check, moment.device) for check in moment.task.device_checks)
        except DeviceError as error:
            raise EvaluatorError(f"a check of {moment.task.name} could not be made: {error}") from error
        return ACCOMPLISHED if done else NOT_YET


def _holds(check: dict[str, Any], phone: AdbPhone) -> bool:
    kind = next((kind for kind in _KINDS if kind in check), None)
    if kind is None or set(check) - _KINDS[kind] - {"absent"}:
        raise EvaluatorError(
            f"a check names an activity, a package, or a setting with its value, not {reprlib.repr(check)}"
        )
    name = str(check[kind])
    if not _NAME.fullmatch(name):
        raise EvaluatorError(f"{name!r} is not a name of an Android {kind}")
    return _READERS[kind](name, check, phone) != bool(check.get("absent", False))


def _activity(name: str, check: dict[str, Any], phone: AdbPhone) -> bool:
    found = _RESUMED.search(phone.shell("dumpsys activity activities"))
    if found is None:
        raise EvaluatorError(f"{phone.serial} does not report its foreground activity")
    return found.group(1) == name or ("/" not in name and found.group(1).split("/")[0] == name)


def _package(name: str, check: dict[str, Any], phone: AdbPhone) -> bool:
    return f"package:{name}" in phone.shell(f"pm list packages {name}").split()


def _setting(name: str, check: dict[str, Any], phone: AdbPhone) -> bool:
    namespace, _, key = name.partition("/")
    if namespace not in _NAMESPACES or not key or "value" not in check:
        raise EvaluatorError(
            f"a setting is system/KEY, secure/KEY or global/KEY with a value, not {reprlib.repr(check)}"
        )
    return phone.shell(f"settings get {namespace} {key}").strip() == str(check["value"])


_READERS = {"activity": _activity, "package": _package, "setting": _setting}
