"""`coso/Android-v0`: a phone task; the picture is the phone's screen, the action a text, for any driver."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from envs.android.actions import LABEL_SPACE, PhoneAction, tap
from envs.android.device import Device, Start
from envs.android.drivers import open_device
from envs.android.evaluators import Evaluator, Moment
from envs.android.evaluators.choice import make_evaluator
from envs.android.expert import next_action
from envs.android.formats import (
    SWIPES,
    AnswerFormat,
    JsonCoordinates,
    PhoneParser,
    json_arguments,
    parse_autoui,
    read_shorthand,
    write_autoui,
    write_cogagent,
)
from envs.android.general_tasks import Split
from envs.android.phone.content import APPS, PAGES, initial_state
from envs.android.task_sets import EMBEDDED, FILE_HORIZON, HORIZONS, load_tasks
from envs.android.tasks import Task
from envs.base import InvalidActionPolicy, Observation, TextActionEnv
from envs.labels import LabelSpace, ParsedAction

#: Seeds from here on play the test tasks in order; runs evaluate with these seeds (`actors.rollouts.episode`).
HELD_OUT_SEED = 2**30
_MINIWOB_SCREEN = (160, 210)
_SCREEN_APPS = ("launcher", *APPS)
_ANSWERS: dict[AnswerFormat, str] = {
    "json": (
        'Answer in JSON: {{"thoughts": "...", "action": "click", "coordinate": [x, y]}} with x up to {x} and y up to '
        '{y}, or "action": "swipe" with "coordinate" and "coordinate2", "type" with "text", "system_button" with '
        '"button" Back, Home or Enter, "terminate" with "status" success or failure.'
    ),
    "autoui": (
        'Answer: Action Decision: "action_type": "DUAL_POINT", "touch_point": "[y, x]", "lift_point": "[y, x]", '
        '"typed_text": "" with points from 0 to 1; or the action_type TYPE, PRESS_BACK, PRESS_HOME, PRESS_ENTER, '
        "STATUS_TASK_COMPLETE or STATUS_TASK_IMPOSSIBLE."
    ),
    "cogagent": (
        'Answer: Grounded Operation: tap [[x,y]] with x and y in thousandths, type "...", press back, press home, '
        "press enter, swipe up, swipe down, swipe left, swipe right, task complete or task impossible."
    ),
}


class AndroidEnv(TextActionEnv):
    """`coso/Android-v0`: the picture is the phone's screen; the prompt holds the task and the previous action.

    Actions: tap, swipe, type, back, home, enter, and "complete" or "impossible", which end the episode, in the three
    formats of `envs.android.formats`. Labels: type, touch cell, lift cell, text bucket. An utterance that names no
    action does nothing (`invalid_action="noop"`, the default here). Reward: 1, and terminated, when the evaluator
    reports success, else 0; MiniWoB++ pages give their own reward, -1 to 1. Truncated after the task set's horizon.

    The task: seeds below 2**30 draw one from the train half; seeds from 2**30 on play the test half in order. State
    for `reset(options={"state": ...})`: `{"task": "toggle/wifi_on", "seed": 7}`, the start of the episode; a phone
    cannot be set to the middle of an episode. If a phone, evaluator or browser fails, `step` and `reset` raise
    `DeviceError` or `EvaluatorError`. This is a failure of the environment, not a reward.
    """

    def __init__(
        self,
        tasks: str = "general",
        driver: str = "browser",
        device: dict[str, Any] | None = None,
        evaluator: str | None = None,
        evaluator_options: dict[str, Any] | None = None,
        only: Sequence[str] = (),
        split: Literal["by_seed", "train", "test"] = "by_seed",
        horizon: int | None = None,
        answer_format: AnswerFormat = "json",
        json_coordinates: JsonCoordinates = "thousandths",
        shuffle_apps: bool = False,
        invalid_action: InvalidActionPolicy = "noop",
        render_mode: str | None = None,
    ) -> None:
        """Open a phone.

        tasks: "general", "webshop", "miniwob", or a file of instructions; only: families or names of tasks to keep;
        driver: "browser", "adb", "appium", "emulator" or a `module:Class`; device: keyword arguments of the driver;
        evaluator: "state", "judge", "adb" or a `module:Class`, None for the default of the tasks; evaluator_options:
        keyword arguments of the evaluator; shuffle_apps: order the launcher's icons by the episode's seed. Raises
        ValueError if arguments do not fit together, DeviceError if there is no such phone.
        """
        if answer_format not in get_args(AnswerFormat):
            raise ValueError(f"answer_format must be one of {', '.join(get_args(AnswerFormat))}, not {answer_format!r}")
        if split not in ("by_seed", "train", "test"):
            raise ValueError(f"split must be by_seed, train or test, not {split!r}")
        embedded = tasks in EMBEDDED or tasks == "miniwob"
        if embedded and driver in ("adb", "appium", "emulator"):
            raise ValueError(f"the tasks {tasks!r} are for the embedded phone (driver 'browser'), not for {driver!r}")
        self._tasks_of = load_tasks(tasks, only)
        self._task_set = tasks
        self._by_name = {task.name: task for half in self._tasks_of.values() for task in half}
        self._evaluator: Evaluator = make_evaluator(evaluator, tasks, evaluator_options or {})
        options = dict(device or {})
        if tasks == "miniwob":
            options = {"screen_size": _MINIWOB_SCREEN, "mobile": False, **options}
        self._device: Device = open_device(driver, options)
        width, height = self._device.screen_size
        self.image_shape = (height, width, 3)
        super().__init__(invalid_action, render_mode)
        self.state_label_names = ("app", "page") if tasks in EMBEDDED else ()
        self._split = split
        self._horizon = HORIZONS.get(tasks, FILE_HORIZON) if horizon is None else horizon
        self._answer_format: AnswerFormat = answer_format
        self._scale = (width, height) if json_coordinates == "pixels" else (1000, 1000)
        self._parser = PhoneParser((width, height), json_coordinates)
        self._shuffle_apps = shuffle_apps
        self._seed: int | None = None
        self._played = 0
        self._task = Task("", "")
        self._phone_seed = 0
        self._instruction = self._previous = ""
        self._screens: list[NDArray[np.uint8]] = []
        self._seen: dict[str, Any] | None = None

    @property
    def task(self) -> Task:
        """The task of the current episode."""
        return self._task

    def tasks(self, split: Split) -> list[Task]:
        """The tasks of one half, in order."""
        return list(self._tasks_of[split])

    @property
    def device(self) -> Device:
        """The phone, for inspection."""
        return self._device

    @property
    def prompt(self) -> str:
        answer = _ANSWERS[self._answer_format].format(x=self._scale[0], y=self._scale[1])
        return f"Task: {self._instruction}\nPrevious action: {self._previous or 'none'}\n{answer}"

    @property
    def state(self) -> dict[str, Any]:
        return {"task": self._task.name, "seed": self._phone_seed}

    @property
    def horizon(self) -> int:
        return self._horizon

    @property
    def label_space(self) -> LabelSpace:
        return LABEL_SPACE

    @property
    def shorthand_help(self) -> str:
        return (
            "tap X Y, swipe X Y X Y (thousandths of the screen), swipe up|down|left|right, type TEXT, back, home, "
            "enter, done, impossible"
        )

    def from_shorthand(self, line: str) -> str | None:
        action = read_shorthand(line, self._device.screen_size)
        return None if action is None else self.write(action)

    def parse(self, utterance: str) -> ParsedAction:
        return self._parser.parse(utterance)

    @property
    def parser(self) -> PhoneParser:
        return self._parser

    @property
    def state_label_sizes(self) -> tuple[int, ...]:
        return (len(_SCREEN_APPS), len(PAGES)) if self._task_set in EMBEDDED else ()

    def state_labels(self) -> NDArray[np.int32]:
        """The current app and page of the embedded phone, int32 (2,); empty for other phones."""
        if self._seen is None:
            return np.empty(0, np.int32)
        screen = self._seen["state"]["screen"]
        return np.array([_SCREEN_APPS.index(screen["app"]), PAGES.index(screen["page"])], np.int32)

    def random_action(self, rng: np.random.Generator | None = None) -> str:
        return write_autoui(_random_action(self.np_random if rng is None else rng))

    def extra_info(self) -> dict[str, Any]:
        return {"instruction": self._instruction}

    def expert_utterance(self, rng: np.random.Generator, noise: float = 0.0, habit: str = "") -> str:
        """The scripted expert's answer; with probability `noise` a tap on a random target. There are no habits.

        Raises NotImplementedError if the phone is not the embedded one, ValueError for a habit."""
        if self._seen is None or not self._task.steps:
            raise NotImplementedError(
                f"the tasks {self._task_set!r} have no expert; only tasks on embedded phones have one"
            )
        if habit:
            raise ValueError("phones have no habits: leave it empty for random actions")
        action, thought = next_action(self._task, self._seen)
        if rng.random() < noise:
            action, thought = _random_target(rng, self._seen)
        return self.write(action, thought)

    def write(self, action: PhoneAction, thought: str = "") -> str:
        """Write an action as an answer in this environment's format."""
        if self._answer_format == "autoui":
            return f"Action Plan: {thought}; Action Decision: {write_autoui(action)}"
        if self._answer_format == "cogagent":
            return f"Plan: {thought}\n{write_cogagent(action)}"
        return json.dumps({"thoughts": thought, **json_arguments(action, self._scale)}, ensure_ascii=False)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        self._seed = seed
        return super().reset(seed=seed, options=options)

    def close(self) -> None:
        self._device.close()

    def _set_state(self, state: dict[str, Any] | None) -> None:
        if state is None:
            task, seed = self._draw_task(), int(self.np_random.integers(2**31))
        else:
            if set(state) != {"task", "seed"}:
                raise ValueError(f"a phone's state has 'task' and 'seed', not {sorted(map(str, state))}")
            if state["task"] not in self._by_name:
                raise ValueError(f"there is no task {state['task']!r} among the {len(self._by_name)} of this set")
            task, seed = self._by_name[state["task"]], state["seed"]
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise ValueError(f"a phone's 'seed' must be an integer of at least 0, not {seed!r}")
        self._task, self._phone_seed = task, seed
        self._instruction, self._previous = task.instruction, ""
        if self._task_set == "miniwob":
            self._device.reset(Start(page=task.name, seed=seed))
            self._instruction = self._device.instruction  # type: ignore[attr-defined]
        elif self._task_set in EMBEDDED:
            self._device.reset(Start(task.begin(initial_state(seed, self._shuffle_apps))))
        else:
            self._device.reset(Start(seed=seed))
        self._screens = []
        self._look()

    def _draw_task(self) -> Task:
        held_out = self._seed is not None and self._seed >= HELD_OUT_SEED
        half = self._split if self._split != "by_seed" else ("test" if held_out else "train")
        tasks = self._tasks_of[half]
        if not tasks:
            raise ValueError(f"`only` excludes every {half} task of {self._task_set!r}")
        if half == "train":
            return tasks[int(self.np_random.integers(len(tasks)))]
        # In order: by the number of the held-out seed, else one after the other.
        number = self._seed - HELD_OUT_SEED if held_out and self._seed is not None else self._played
        self._played += 1
        return tasks[number % len(tasks)]

    def _act(self, action: str) -> tuple[float, bool, bool]:
        done = parse_autoui(action, self._device.screen_size) if action else None
        self._previous = json.dumps(json_arguments(done, self._scale), ensure_ascii=False) if done else "not understood"
        if done is not None:
            _do(self._device, done)
            self._look()
        verdict = self._evaluator.verdict(
            Moment(self._task, self._screens, self._seen and self._seen["state"], self._device)
        )
        given_up = done is not None and done.type.startswith("status_")
        return verdict.reward, verdict.over or given_up, verdict.success

    def _look(self) -> None:
        screen = self._device.screenshot()
        if screen.shape != self.image_shape:
            # The device was rotated. Taps use shares of the screen, so they still hit what the resized picture shows.
            height, width, _ = self.image_shape
            screen = np.asarray(Image.fromarray(screen).resize((width, height), Image.Resampling.BILINEAR))
        self._screens.append(screen)
        self._seen = self._device.inspect() if self._task_set in EMBEDDED else None  # type: ignore[attr-defined]

    def _picture(self) -> NDArray[np.uint8]:
        return self._screens[-1].copy()


def _do(device: Device, action: PhoneAction) -> None:
    if action.type == "tap":
        assert action.touch is not None
        device.tap(action.touch)
    elif action.type == "swipe":
        assert action.touch is not None and action.lift is not None
        device.swipe(action.touch, action.lift)
    elif action.type == "type":
        device.text(action.text or "")
    elif action.type == "press_back":
        device.key("back")
    elif action.type == "press_home":
        device.key("home")
    elif action.type == "press_enter":
        device.key("enter")


def _random_action(rng: np.random.Generator) -> PhoneAction:
    """Mostly taps at random points; sometimes a swipe, a word or a key."""
    draw = rng.random()
    if draw < 0.7:
        return tap(*(float(value) for value in rng.random(2)))
    if draw < 0.8:
        return PhoneAction("swipe", *SWIPES[str(rng.choice(list(SWIPES)))])
    if draw < 0.9:
        return PhoneAction("type", text=str(rng.choice(["hello", "coffee mug", "07:30", "amberly.com"])))
    return PhoneAction(("press_back", "press_home", "press_enter")[int(rng.integers(3))])


def _random_target(rng: np.random.Generator, seen: dict[str, Any]) -> tuple[PhoneAction, str]:
    targets = [target for target in seen["targets"] if target["shown"]]
    if not targets:
        return PhoneAction("press_home"), "go home"
    target = targets[int(rng.integers(len(targets)))]
    return tap(target["x"], target["y"]), f"tap {target['id'].replace(':', ' ').replace('_', ' ')}"
