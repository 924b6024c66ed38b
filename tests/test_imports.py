"""Imports run one way: between the top folders, and between the rooms of `cluster/` (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Each folder, and the folders (or single modules) of ours that it may import.
FOLDERS = {
    "envs": set(),
    "actors": {"envs"},
    "scoring": {"actors.repeated_failures", "actors.trajectory", "envs"},
    "learner": {"actors", "scoring", "envs"},
    "cluster": {"envs", "actors", "scoring", "learner"},
}
#: Inside `cluster/`, from the top down: a room may import those below it.
ROOMS = (
    "cli", "model_check", "training", "report", "run", "demonstrations", "launch", "fleet", "play", "telemetry",
    "config", "environments", "replacing", "errors",
)  # fmt: skip


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(allowed + ".")


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_what_the_plan_allows(folder: str) -> None:
    ours = {*FOLDERS, "tools", "tests", "benchmarks", "examples"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(folder)
        for line, name in imports(path)
        if (top := name.split(".")[0]) in ours and top != folder
        if not any(within(name, allowed) for allowed in FOLDERS[folder])
    ]
    assert wrong == []


def test_rooms_of_cluster_import_downwards() -> None:
    def room(name: str) -> int:
        return ROOMS.index(name.split(".")[1])

    wrong = []
    for path in modules("cluster"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts == ("cluster", "__init__"):
            continue
        for line, name in imports(path):
            if within(name, "cluster") and room(name) < room(".".join(parts)):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_algorithms_know_neither_engine_nor_actors_nor_files() -> None:
    """`learner/algorithms/` sees tensors and trajectories; DeepSpeed, Ray and the rank stay outside."""
    forbidden = (
        "deepspeed",
        "ray",
        "pathlib",
        "learner.engine",
        "learner.rank",
        "learner.group",
        "learner.checkpoints.format",
    )
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules("learner/algorithms")
        for line, name in imports(path)
        if any(within(name, each) for each in forbidden)
    ]
    assert wrong == []
