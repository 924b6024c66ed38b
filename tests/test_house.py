"""The shape of the code base: short modules, short functions, folders that one can survey, tests beside the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ("envs", "actors", "scoring", "learner", "cluster", "tools")
#: (lines of a module, lines of a function). Tests and benchmarks are lists of cases, which may be longer.
LIMITS = {**dict.fromkeys(PROGRAM, (400, 60)), "tests": (450, 60), "benchmarks": (450, 80)}
#: Modules in one folder, `__init__.py` not counted.
FOLDER_LIMIT = 15
FULL_FOLDERS = {
    "cluster/cli": "one module for each command, as the floor plan says",
    "benchmarks": "one module for each question; each is run by hand and shares only record.py and machine.py",
    "envs/android": "drivers of a phone (browser, adb, Appium, fleet) share device.py's protocol and one environment",
}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("folder", LIMITS)
def test_modules_and_functions_are_short(folder: str) -> None:
    module_limit, function_limit = LIMITS[folder]
    long = []
    for path in modules(folder):
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > module_limit:
            long.append(f"{name(path)}: {lines} lines, at most {module_limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > function_limit:
                    long.append(f"{name(path)}:{node.lineno}: {node.name} has {lines} lines, at most {function_limit}")
    assert long == []


def test_full_folders_are_those_with_a_reason() -> None:
    """A folder past the limit is divided, or named above with the reason; one that is full no more is taken out."""
    counts: dict[str, int] = {}
    for path in (path for folder in LIMITS for path in modules(folder) if path.name != "__init__.py"):
        counts[name(path.parent)] = counts.get(name(path.parent), 0) + 1
    full = {folder: count for folder, count in counts.items() if count > FOLDER_LIMIT}
    assert full.keys() == FULL_FOLDERS.keys(), full


def test_folders_of_tests_mirror_the_code() -> None:
    """`tests/X/Y` tests `X/Y`, so that a reader of either knows where the other is."""
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in modules("tests")}
    assert sorted(folder for folder in folders if not (ROOT / folder).is_dir()) == []
