"""The scripted expert of the embedded phone: it chooses the next action from what is on the screen.

It plans again at every step from the phone's state, so it can continue from any state.
"""

from __future__ import annotations

from typing import Any

from envs.android.actions import PhoneAction, tap
from envs.android.formats import SWIPES
from envs.android.tasks import Step, Task


def next_action(task: Task, seen: dict[str, Any]) -> tuple[PhoneAction, str]:
    """The next action and a short reason. seen: the result of `InspectableDevice.inspect`."""
    state = seen["state"]
    targets = {target["id"]: target for target in seen["targets"]}
    index, step = next(
        ((index, step) for index, step in enumerate(task.steps) if not step.is_done(state)),
        (len(task.steps) - 1, task.steps[-1]),
    )
    if step.text is not None:
        action = _type(step, state, targets)
        if action is not None:
            return action
    elif step.target in targets:
        return _reach(targets[step.target], step.target)
    if index and state["screen"]["app"] != "launcher":
        return PhoneAction("press_back"), "this is not the right page, go back"
    return PhoneAction("press_home"), "this is not the right app, go home"


def _type(step: Step, state: dict[str, Any], targets: dict[str, Any]) -> tuple[PhoneAction, str] | None:
    """The next action to fill a field, or None if the field is not on the screen."""
    name = f"field:{step.target}"
    if step.target == "url" and name not in targets and "edit_url" in targets:
        return _reach(targets["edit_url"], "edit_url")
    if name not in targets:
        return None
    held = state["fields"].get(step.target, "")
    if held and held != step.text:
        return _reach(targets[f"clear:{step.target}"], f"clear:{step.target}")
    if state["focus"] != step.target:
        return _reach(targets[name], name)
    if held != step.text:
        return PhoneAction("type", text=step.text), f"type {step.text}"
    return PhoneAction("press_enter"), "press enter"


def _reach(target: dict[str, Any], name: str) -> tuple[PhoneAction, str]:
    """Tap a target, or scroll towards it first."""
    words = name.replace(":", " ").replace("_", " ")
    if target["shown"]:
        return tap(target["x"], target["y"]), f"tap {words}"
    direction = "down" if target["y"] < 0.2 else "up"
    return PhoneAction("swipe", *SWIPES[direction]), f"scroll to {words}"
