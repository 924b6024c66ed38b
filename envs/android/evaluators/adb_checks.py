"""`adb`: conditions on a real device, read through adb: the activity in front, an installed package, a setting."""

from __future__ import annotations

import re
from typing import Any

from envs.android.adb import AdbPhone
from envs.android.device import DeviceError
from envs.android.evaluators.base import ACCOMPLISHED, NOT_YET, Evaluator, EvaluatorError, Moment, Verdict

#: Names that go to the device's shell: letters, digits and what Android's own names are made of besides.
_NAME = re.compile(r"[A-Za-z0-9_.$/-]{1,200}")
_NAMESPACES = ("system", "secure", "global")
#: Android 10 and later, then 8 and 9.
_RESUMED = re.compile(r"(?:topResumedActivity|ResumedActivity|mResumedActivity)[=:]\s?ActivityRecord\{\S+ \S+ (\S+)")
_KINDS = {"activity": {"activity"}, "package": {"package"}, "setting": {"setting", "value"}}


class AdbEvaluator(Evaluator):
    """Succeeds when all of a task's checks hold; they come from a YAML task file.

    `{activity: com.android.settings/.Settings}`: the activity in front, the part after the slash may be left out;
    `{package: org.example.app}`: is installed, with `absent: true` is not; `{setting: global/airplane_mode_on, value:
    "1"}`: a system, secure or global setting has a value.
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
        raise EvaluatorError(f"a check names an activity, a package, or a setting with its value, not {check!r}")
    name = str(check[kind])
    if not _NAME.fullmatch(name):
        raise EvaluatorError(f"{name!r} is no name of an Android {kind}")
    return _READERS[kind](name, check, phone) != bool(check.get("absent", False))


def _activity(name: str, check: dict[str, Any], phone: AdbPhone) -> bool:
    found = _RESUMED.search(phone.shell("dumpsys activity activities"))
    if found is None:
        raise EvaluatorError(f"{phone.serial} does not say which activity is in front")
    return found.group(1) == name or ("/" not in name and found.group(1).split("/")[0] == name)


def _package(name: str, check: dict[str, Any], phone: AdbPhone) -> bool:
    return f"package:{name}" in phone.shell(f"pm list packages {name}").split()


def _setting(name: str, check: dict[str, Any], phone: AdbPhone) -> bool:
    namespace, _, key = name.partition("/")
    if namespace not in _NAMESPACES or not key or "value" not in check:
        raise EvaluatorError(f"a setting is system/KEY, secure/KEY or global/KEY with a value, not {check!r}")
    return phone.shell(f"settings get {namespace} {key}").strip() == str(check["value"])


_READERS = {"activity": _activity, "package": _package, "setting": _setting}
