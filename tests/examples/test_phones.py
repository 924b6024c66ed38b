"""Phones with a file of tasks: examples/phones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import envs  # noqa: F401
from actors.trajectory import TrajectoryLog
from cluster.telemetry.metrics import read_metrics
from envs.android.actions import PhoneAction, tap
from envs.android.browser import missing_for_browser
from envs.android.environment import AndroidEnv
from envs.android.evaluators import EvaluatorError
from envs.android.tasks import read_task_file
from tests.cluster.conftest import TINY, Coso

EXAMPLE = Path("examples/phones")
EVALUATOR = "phone_checks:StateChecks"
#: What to tap, or to type, to do each task of both files.
WAYS = {
    "Open the Clock app": ["open:clock"],
    "Open the Notes app": ["open:notes"],
    "Open the Maps app": ["open:maps"],
    "Open the Weather app": ["open:weather"],
    "Show the battery settings": ["open:settings", "page:battery"],
    "Turn on the dark theme": ["open:settings", "page:display", "toggle:dark_mode"],
    "Start a timer for 5 minutes": ["open:clock", "tab:timer", "timer:5"],
    'Create a note called "Packing list"': [
        "open:notes", "new_note", "field:note_title", "type Packing list", "save_note",
    ],
    "Open the Calendar app": ["open:calendar"],
    "Open the Contacts app": ["open:contacts"],
    "Turn on airplane mode": ["open:settings", "page:network", "toggle:airplane_mode"],
}  # fmt: skip

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing_for_browser() is not None, reason=missing_for_browser() or ""),
]


@pytest.fixture(autouse=True)
def example_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLE), prepend=os.pathsep)


@pytest.fixture
def phone() -> Iterator[AndroidEnv]:
    env = gymnasium.make("coso/Android-v0", tasks=str(EXAMPLE / "tasks.yaml"), evaluator=EVALUATOR).unwrapped
    assert isinstance(env, AndroidEnv)
    yield env
    env.close()


def do(env: AndroidEnv, leg: str) -> tuple[Any, ...]:
    if leg.startswith("type "):
        return env.step(env.write(PhoneAction("type", text=leg.removeprefix("type "))))
    (target,) = [each for each in env.device.inspect()["targets"] if each["id"] == leg]  # type: ignore[attr-defined]
    return env.step(env.write(tap(target["x"], target["y"])))


@pytest.mark.integration
def test_every_task_is_open_at_first_and_done_by_its_way_and_not_before(phone: AndroidEnv) -> None:
    tasks = [*phone.tasks("train"), *phone.tasks("test")]
    assert {task.instruction for task in tasks} == set(WAYS)
    assert len(phone.tasks("train")) == len(read_task_file(EXAMPLE / "tasks.yaml")) == 8
    for seed, task in enumerate(tasks):
        observation, _ = phone.reset(options={"state": {"task": task.name, "seed": seed}})
        assert task.instruction in observation["prompt"]
        *before, last = WAYS[task.instruction]
        for leg in before:
            assert do(phone, leg)[1:3] == (0.0, False), (task.instruction, leg)
        _, reward, terminated, _, info = do(phone, last)
        assert (reward, terminated, info["success"]) == (1.0, True, True), task.instruction


@pytest.mark.integration
def test_a_check_that_is_none_is_named(tmp_path: Path) -> None:
    tasks = tmp_path / "mine.yaml"
    tasks.write_text("- {instruction: Rest, checks: [{path: screen.app, is: clock}]}\n- {instruction: Wait}\n")
    env = gymnasium.make("coso/Android-v0", tasks=str(tasks), evaluator=EVALUATOR).unwrapped
    try:
        for name, says in (("mine/1", "mine/1: a check has a path, an operator and a value"), ("mine/2", "no checks")):
            env.reset(options={"state": {"task": name, "seed": 1}})
            with pytest.raises(EvaluatorError, match=says):
                env.step("nothing")
    finally:
        env.close()


@pytest.mark.end_to_end
def test_a_person_does_a_task_on_the_page() -> None:
    words = ["play", "coso/Android-v0", f"tasks={EXAMPLE / 'tasks.yaml'}", f"evaluator={EVALUATOR}", "--page", "0"]
    playing = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli.main", *words, "only=[tasks/1]"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert playing.stdout is not None
        (url,) = re.findall(r"the screen is at (\S+)", playing.stdout.readline())
        prompt, deadline = "", time.monotonic() + 60
        while not prompt and time.monotonic() < deadline:  # the page is there before the phone is
            with urllib.request.urlopen(f"{url}state?0", timeout=60) as response:
                prompt = json.load(response)["prompt"]
        assert "Open the Clock app" in prompt
        urllib.request.urlopen(f"{url}answer", b"tap 780 560", timeout=60).close()
        output, _ = playing.communicate(timeout=60)
    finally:
        playing.kill()
    assert playing.returncode == 0 and "1 of 1 finished episodes succeeded" in output, output


@pytest.mark.end_to_end
def test_a_model_that_was_taught_the_built_in_tasks_is_evaluated_and_trained_on_these(tmp_path: Path) -> None:
    coso, model = Coso(tmp_path / "runs", tmp_path / "model"), tmp_path / "model"
    small = [*TINY[1:], f"folder={coso.folder}", f"model.path={model}", "training.evaluation_episodes=3"]
    coso.run(
        "warmstart", "configs/phones.yaml", *small, f"warm_start.output={model}", "warm_start.demonstrations=60",
        "warm_start.steps=60", "warm_start.vision_steps=5",
    )  # fmt: skip
    files = ["configs/phones.yaml", str(EXAMPLE / "phones.yaml")]
    figures = coso.run("eval", *files, *small)
    assert '"evaluation/episodes": 3' in figures
    coso.run("train", *files, *small, "training.updates=1")
    run = coso.folder / "my-phones"
    assert read_metrics(run / "metrics.jsonl")[-1]["update"] == 1
    instructions = {task.instruction for task in read_task_file(EXAMPLE / "tasks.yaml")}
    prompts = TrajectoryLog(run / "trajectories").read(1).column("prompt")
    assert {prompt.split("\n")[0].removeprefix("Task: ") for prompt in prompts} <= instructions
