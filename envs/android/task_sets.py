"""The task sets by name: `general`, `webshop`, `miniwob`, or a file of instructions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from envs.android.general_tasks import Split, general_tasks
from envs.android.tasks import Task, read_task_file
from envs.android.webshop_tasks import webshop_tasks

EMBEDDED = {"general": general_tasks, "webshop": webshop_tasks}
#: MiniWoB++ pages that taps, scrolling and typing can solve. The page makes its instruction from the seed.
MINIWOB_PAGES = [
    "click-button",
    "click-button-sequence",
    "click-checkboxes",
    "click-checkboxes-large",
    "click-collapsible",
    "click-color",
    "click-dialog",
    "click-dialog-2",
    "click-link",
    "click-option",
    "click-tab",
    "click-tab-2",
    "click-test",
    "click-test-2",
    "click-widget",
    "enter-password",
    "enter-text",
    "enter-text-2",
    "focus-text",
    "focus-text-2",
    "grid-coordinate",
    "identify-shape",
    "login-user",
    "navigate-tree",
    "read-table",
    "search-engine",
    "simple-algebra",
    "simple-arithmetic",
    "social-media",
]
#: Steps after which an episode is truncated (published: General 10, Web Shopping 20).
HORIZONS = {"general": 10, "webshop": 20, "miniwob": 10}
FILE_HORIZON = 10


def load_tasks(tasks: str, only: Sequence[str] = ()) -> dict[Split, list[Task]]:
    """The train and the test half of a set, or of a file, each in order; `only` keeps some families or names.

    If a file `STEM_test.SUFFIX` exists beside a task file, it is the test half; else the file is both halves. MiniWoB++
    has the same pages in both halves, with different seeds. Raises ValueError for an unknown set, an invalid file, or
    a word of `only` that matches no task.
    """
    halves: dict[Split, list[Task]] = {"train": _half(tasks, "train"), "test": _half(tasks, "test")}
    everything = [task for half in halves.values() for task in half]
    for word in only:
        if not any(word in (task.family, task.name) for task in everything):
            families = ", ".join(sorted({task.family for task in everything}))
            raise ValueError(f"there is no task or family of tasks {word!r} in {tasks}; families: {families}")
    return {
        half: [task for task in each if not only or task.family in only or task.name in only]
        for half, each in halves.items()
    }


def _half(tasks: str, split: Split) -> list[Task]:
    if tasks in EMBEDDED:
        return list(EMBEDDED[tasks](split))
    if tasks == "miniwob":
        return [Task(page, "") for page in MINIWOB_PAGES]
    path = Path(tasks)
    if not path.is_file():
        raise ValueError(f"tasks must be general, webshop, miniwob or a file of instructions; there is no {tasks!r}")
    held_out = path.with_stem(f"{path.stem}_test")
    return read_task_file(held_out if split == "test" and held_out.is_file() else path)
