"""Phone tasks: an instruction, the initial state, the success condition, and the expert's steps.

Everything about a task is data: conditions and edits are over the embedded phone's state, a JSON object. Tasks for
real devices are lines of a text file (`read_task_file`) and carry an instruction only, or checks for `adb`.
"""

from __future__ import annotations

import copy
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from envs.android.phone.content import State

_MISSING = object()


@dataclass(frozen=True)
class Check:
    """One condition on a state: the value at a path `equals` a value, is `in` a list, or `has` or `lacks` an element.

    An element matches a pattern if: for an object, it has all keys of the pattern with matching values; for a list,
    each element of the pattern matches some element; otherwise, it is equal.
    """

    path: str
    operator: Literal["equals", "in", "has", "lacks"]
    value: Any

    def holds(self, state: State) -> bool:
        """Whether the condition holds in a state; if the path does not exist, only `lacks` holds."""
        found = _lookup(state, self.path)
        if self.operator == "equals":
            return found == self.value
        if self.operator == "in":
            return found in self.value
        has = isinstance(found, list) and any(matches(self.value, element) for element in found)
        return has == (self.operator == "has")


@dataclass(frozen=True)
class Edit:
    """A change of a task's initial state: `set` a value, `put` an element in a list, `drop` the elements that match."""

    operator: Literal["set", "put", "drop"]
    path: str
    value: Any

    def apply(self, state: State) -> None:
        """Change `state` in place. Raises KeyError if the path does not exist."""
        *parents, last = self.path.split(".")
        holder: Any = state
        for part in parents:
            holder = holder[part]
        if self.operator == "set":
            holder[last] = copy.deepcopy(self.value)
            return
        kept = [element for element in holder[last] if not matches(self.value, element)]
        if self.operator == "put":
            kept.append(copy.deepcopy(self.value))
            # In the order of the apps.
            if self.path == "contacts":
                kept.sort(key=lambda contact: contact["name"])
            elif self.path == "alarms":
                kept.sort(key=lambda alarm: alarm["time"])
        holder[last] = kept


Conditions = tuple[Check, ...]


@dataclass(frozen=True)
class Step:
    """One step of the expert: tap `target`, or type `text` into the field of that name, until the step is `done`.

    done: alternatives, each a set of conditions that must all hold; the last step of a task has none and ends with the
    task's success. submit: press enter after typing.
    """

    target: str
    done: tuple[Conditions, ...] = ()
    text: str | None = None
    submit: bool = False

    def is_done(self, state: State) -> bool:
        """Whether this step is done in this state."""
        return any(all(check.holds(state) for check in conditions) for conditions in self.done)


@dataclass(frozen=True)
class Task:
    """An instruction with its initial state, success condition and expert steps; `name` is unique in its set."""

    name: str
    instruction: str
    success: Conditions = ()
    setup: tuple[Edit, ...] = ()
    steps: tuple[Step, ...] = ()
    #: Conditions on a real device, for `envs.android.evaluators.AdbEvaluator`.
    device_checks: tuple[dict[str, Any], ...] = field(default=(), hash=False)

    @property
    def family(self) -> str:
        """The name of its template: the part of `name` before the first slash."""
        return self.name.partition("/")[0]

    def begin(self, state: State) -> State:
        """The task's initial state, made from a phone's initial state `state`."""
        state = copy.deepcopy(state)
        for edit in self.setup:
            edit.apply(state)
        return state

    def succeeded(self, state: State) -> bool:
        """Whether the task is accomplished in a state."""
        return bool(self.success) and all(check.holds(state) for check in self.success)


def matches(pattern: Any, value: Any) -> bool:
    """Whether a value matches a pattern (see `Check`)."""
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(matches(each, value.get(key, _MISSING)) for key, each in pattern.items())
    if isinstance(pattern, list):
        return isinstance(value, list) and all(any(matches(each, element) for element in value) for each in pattern)
    return bool(pattern == value)


def screen(app: str, *pages: str, **details: Any) -> Conditions:
    """The conditions that the screen shows an app, one of the pages (any, if none is named), with these details."""
    conditions = [Check("screen.app", "equals", app)]
    if pages:
        conditions.append(Check("screen.page", "in", list(pages)))
    return (*conditions, *(Check(f"screen.{name}", "equals", value) for name, value in details.items()))


def read_task_file(path: str | Path) -> list[Task]:
    """Read tasks from a text file, one instruction per line (blank lines and `#` comments are ignored), or a YAML list.

    A YAML file is a list of `{instruction: ..., checks: [...]}` with checks of `AdbEvaluator`. Raises ValueError that
    names the file and the place for invalid content, and OSError for a file that cannot be read.
    """
    path = Path(path)
    text = path.read_text("utf-8")
    if path.suffix in (".yaml", ".yml"):
        return _tasks_of_yaml(path, text)
    lines = [line.strip() for line in text.splitlines()]
    tasks = [
        Task(f"{path.stem}/{number}", line)
        for number, line in enumerate(lines, start=1)
        if line and not line.startswith("#")
    ]
    if not tasks:
        raise ValueError(f"{path} has no instructions: write one per line")
    return tasks


def _tasks_of_yaml(path: Path, text: str) -> list[Task]:
    try:
        entries = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a list of tasks, each with an instruction")
    tasks = []
    for number, entry in enumerate(entries, start=1):
        known = {"instruction", "checks"}
        if not isinstance(entry, dict) or not isinstance(entry.get("instruction"), str) or set(entry) - known:
            raise ValueError(
                f"{path}, task {number}: a task has an instruction (text) and checks (a list), not "
                f"{reprlib.repr(entry)}"
            )
        checks = entry.get("checks") or []
        if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
            raise ValueError(f"{path}, task {number}: checks must be a list of objects, not {reprlib.repr(checks)}")
        tasks.append(Task(f"{path.stem}/{number}", entry["instruction"], device_checks=tuple(checks)))
    return tasks


def _lookup(state: State, path: str) -> Any:
    found: Any = state
    for part in path.split("."):
        if not isinstance(found, dict) or part not in found:
            return _MISSING
        found = found[part]
    return found
