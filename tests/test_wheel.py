"""The wheel holds all that the project needs: it is built, installed elsewhere and used from another folder.

Its dependencies are those of the Python that runs the tests. That the ones it declares are enough for `coso --help` and
`import envs` is checked by `test_what_it_imports_at_once_is_declared`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution, distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = [pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves folders behind, and packs what former builds left."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed here, and building must not need a network")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", str(built), str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel in it. Of this project, it sees nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    # Of a folder that a .pth file names, the .pth files are not read: an editable install there does not count.
    (packages / "dependencies.pth").write_text(f"{distribution('numpy').locate_file('')}\n", encoding="utf-8")
    return python


def run(*command: str | Path, folder: Path) -> str:
    """The command's output, in another folder and with nothing of ours on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_of_the_packages_is_inside(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path(name).suffix for name in ours} >= {".py", ".html", ".jinja", ".css", ".js"}
    assert ours <= inside
    assert {name.split("/")[0] for name in inside} == {
        *PACKAGES,
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info",
    }
    assert any(name.endswith("/licenses/LICENSE") for name in inside)


def test_coso_and_the_environments_work_from_another_folder(python: Path, tmp_path: Path) -> None:
    coso = python.with_name("coso")
    assert run(coso, "--version", folder=tmp_path) == f"coso-rl {PROJECT['project']['version']}\n"
    assert "warmstart" in run(coso, "--help", folder=tmp_path)
    program = (
        "import envs, gymnasium\n"
        "environment = gymnasium.make('coso/NumberLine-v0')\n"
        "observation, _ = environment.reset(seed=1)\n"
        "print(envs.__file__)\n"
        "print(observation['image'].shape)"
    )
    place, shape = run(python, "-c", program, folder=tmp_path).splitlines()
    assert Path(place).is_relative_to(python.parents[1]) and shape == "(300, 300, 3)"


def test_the_contract_suite_runs_from_the_installation(python: Path, tmp_path: Path) -> None:
    words = ["--pyargs", "envs.contract", "--env", "coso/NumberLine-v0", "-k", "not memory", "-p", "no:cacheprovider"]
    assert " passed" in run(python, "-m", "pytest", "-q", *words, folder=tmp_path)


def test_every_package_of_ours_is_found_in_the_installation(python: Path, tmp_path: Path) -> None:
    program = f"import importlib.util\nfor package in {PACKAGES!r}: print(importlib.util.find_spec(package).origin)"
    for place in run(python, "-c", program, folder=tmp_path).splitlines():
        assert Path(place).is_relative_to(python.parents[1])


def test_what_it_imports_at_once_is_declared(python: Path, tmp_path: Path) -> None:
    """`coso --help` and `import envs` import nothing but the declared dependencies and what those require."""
    program = (
        "import sys, envs, envs.cards.number_line, cluster.cli.main\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    imported = set(run(python, "-c", program, folder=tmp_path).split())
    owners = packages_distributions()
    needed = {canonicalize_name(owner) for name in imported - set(PACKAGES) for owner in owners.get(name, [])}
    assert {"numpy", "gymnasium", "typer", "pydantic"} <= needed
    assert needed <= declared()


def declared() -> set[str]:
    """The names of the declared dependencies, and of all that these require in turn."""
    installed = {canonicalize_name(each.metadata["Name"]): each for each in distributions()}
    found: set[str] = set()
    open_ends = [canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]]
    while open_ends:
        name = open_ends.pop()
        if name in found or name not in installed:
            continue
        found.add(name)
        for line in installed[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                open_ends.append(canonicalize_name(requirement.name))
    return found
