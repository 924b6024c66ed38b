"""The suite as its user starts it: `python -m pytest --pyargs envs.contract`, from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.integration


def suite(folder: Path, *words: str) -> tuple[int, str]:
    # Without what an installation declares as an entry point (tests/test_wheel.py), `-p` names the plugin.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "envs.contract", *words]
    if "coso_contract" not in {each.name for each in entry_points(group="pytest11")}:
        command[3:3] = ["-p", "envs.contract.plugin"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def test_the_suite_reports_each_check_of_an_environment_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import gymnasium\nfrom tests.envs.contract.broken_environments import NoSuccess\n"
        "gymnasium.register('mine/Game-v0', entry_point=NoSuccess)\n",
        encoding="utf-8",
    )
    code, said = suite(
        tmp_path, "--env", "mine:mine/Game-v0", "-k", "makes or outputs or closes", "--env-kwarg", "invalid_action=noop"
    )
    assert code == 1 and "1 failed, 2 passed" in said, said
    assert "mine:mine/Game-v0, outputs: mine:mine/Game-v0: step returned an info without 'success'" in said


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    code, said = suite(tmp_path)
    assert code == 4 and "name what to test: --env ID" in said, said


def test_other_runs_of_pytest_see_nothing_of_the_options(tmp_path: Path) -> None:
    """`--env` is theirs, also where a folder has a similar name."""
    (tmp_path / "envs" / "contract").mkdir(parents=True)
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--env')\n", encoding="utf-8"
    )
    (tmp_path / "envs" / "contract" / "test_other.py").write_text(
        "def test_other(request):\n    assert request.config.getoption('--env') == 'theirs'\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "envs/contract", "--env", "theirs"]
    if "coso_contract" not in {each.name for each in entry_points(group="pytest11")}:
        command[3:3] = ["-p", "envs.contract.plugin"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
