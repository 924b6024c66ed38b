"""`make setup`: check the machine, create `.venv`, install the pinned packages of a profile into it.

Runs as a script with the machine's own Python. So it uses only the standard library and no syntax newer than Python
3.6: a Python that is too old must still be able to print the error. A missing requirement is one line on stderr, exit
code 1. The stamp `.venv/setup.json` records what is installed, so that a second set-up has nothing to do. An
interrupted set-up leaves a stamp without a fingerprint, and the next one continues.
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)  # the pinned wheels are built for these
GIB = 2**30
#: Free disk for the environment and pip's temporary files, bytes (the CPU profile takes 3.9 GB, the GPU one 15).
DISK_BYTES = {"cpu": 8 * GIB, "gpu": 25 * GIB}
#: Optional engines of environments; each has its own list of pins, in addition to the profile's.
EXTRAS = ("alfworld",)
#: Memory for engine, learner and environments together, bytes; a machine sold as 8 GB reports a little less.
MEMORY_BYTES = int(7.5 * GIB)
#: Oldest C library that the pinned wheels (manylinux_2_28) load on.
OLDEST_GLIBC = (2, 28)

#: Program for the new environment's Python: prints the CUDA version that torch was built for, without importing torch,
#: since a CUDA build without its libraries cannot be imported.
TORCH_CUDA_VERSION = """
import importlib.util, pathlib, re
version_file = pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")
found = re.search(r"^cuda\\b[^=]*=\\s*'([^']+)'", version_file.read_text(), re.MULTILINE)
print(found.group(1) if found else "")
"""


class MachineLacks(Exception):
    """A requirement is missing. The message is one line: what is missing, and what to do."""


def preflight(profile: str, for_image: bool = False) -> None:
    """Raise `MachineLacks` for the first thing that set-up or a run of `profile` would fail on later.

    for_image: set up a container image, which will run on another machine: memory, processor and GPU are not checked.
    """
    require_python(tuple(sys.version_info[:2]), platform.python_implementation())
    require_platform(platform.system(), platform.machine())
    require_glibc(platform.libc_ver())
    require_modules(find_missing_modules())
    require_disk(shutil.disk_usage(str(ROOT)).free, profile, ROOT)
    if not for_image:
        require_memory(memory_bytes())
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if profile == "cpu":
        require_numa(has_library("libnuma.so.1"))
        if not for_image:
            require_avx2(read_text(Path("/proc/cpuinfo")))
        if compiler is None:
            print(
                "setup: note: there is no C compiler; demo and training work without, torch.compile and offload do not"
            )
    else:
        require_compiler(compiler)
        require_headers(Path(sysconfig.get_path("include")))
        if not for_image:
            require_gpu(Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None)


def preflight_extras() -> None:
    """Raise `MachineLacks` if a tool is missing that builds the extras' packages without wheels."""
    require_build_tools([tool for tool in ("c++", "cc", "make") if shutil.which(tool) is None])


def require_python(version: "tuple[int, ...]", implementation: str) -> None:
    if implementation != "CPython" or not OLDEST_PYTHON <= tuple(version) <= NEWEST_PYTHON:
        raise MachineLacks(
            "Python {}.{} to {}.{} (CPython) is needed, this is {} {}.{}; install one and select it: "
            "make setup PYTHON=python3.11".format(*OLDEST_PYTHON, *NEWEST_PYTHON, implementation, *version)
        )


def require_platform(system: str, machine: str) -> None:
    if (system, machine) != ("Linux", "x86_64"):
        raise MachineLacks(
            f"Linux on x86-64 is needed, this is {system} on {machine}; use such a machine or a container of it"
        )


def require_glibc(library: "tuple[str, str]") -> None:
    name, version = library
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < OLDEST_GLIBC:
        raise MachineLacks(
            "the C library glibc {}.{} or newer is needed, this is {} {}; use a newer or another distribution "
            "(Debian 10, Ubuntu 20.04, RHEL 8 or later)".format(*OLDEST_GLIBC, name or "another one", version)
        )


def find_missing_modules() -> "list[str]":
    """Missing standard modules; some distributions package them separately."""
    missing = []
    for name in ("venv", "ensurepip", "ssl", "sqlite3"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    return missing


def require_modules(missing: "list[str]") -> None:
    if missing:
        raise MachineLacks(
            "this Python lacks {}; install its missing part (Debian and Ubuntu: apt-get install python3-venv) or "
            "select another Python: make setup PYTHON=python3.11".format(" and ".join(missing))
        )


def has_library(name: str) -> bool:
    """Whether the loader finds this shared library."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def require_numa(present: bool) -> None:
    if not present:
        raise MachineLacks(
            "the library libnuma.so.1 is needed by vLLM's CPU build; install it "
            "(Debian and Ubuntu: apt-get install libnuma1)"
        )


def require_compiler(path: "str | None") -> None:
    if path is None:
        raise MachineLacks(
            "a C compiler is needed (Triton and DeepSpeed compile kernels at run time); "
            "install gcc (Debian and Ubuntu: apt-get install build-essential)"
        )


def require_build_tools(missing: "list[str]") -> None:
    if missing:
        raise MachineLacks(
            "the extra alfworld is built from source and needs {}; install them "
            "(Debian and Ubuntu: apt-get install build-essential)".format(", ".join(missing))
        )


def require_headers(include: Path) -> None:
    if not (include / "Python.h").exists():
        raise MachineLacks(
            f"Triton needs Python's C headers, but {include} has no Python.h; "
            "install them (Debian and Ubuntu: apt-get install python3-dev)"
        )


def require_memory(size: "int | None") -> None:
    if size is not None and size < MEMORY_BYTES:
        raise MachineLacks(
            f"8 GB of memory are needed, this machine or container has {size / GIB:.1f} GiB; "
            "use a bigger one or raise the container's limit"
        )


def require_disk(free: int, profile: str, path: Path) -> None:
    if free < DISK_BYTES[profile]:
        raise MachineLacks(
            f"{DISK_BYTES[profile] // GIB} GiB of free disk are needed for the {profile} profile, {path} has "
            f"{free / GIB:.1f} GiB; free some or move the project to a bigger disk"
        )


def require_avx2(cpuinfo: str) -> None:
    if cpuinfo and "avx2" not in cpuinfo.split():
        raise MachineLacks(
            "vLLM's CPU build needs a processor with AVX2, /proc/cpuinfo shows none; use a machine made after "
            "about 2015, or configure the virtual machine to pass the host's processor through"
        )


def require_gpu(present: bool) -> None:
    if not present:
        raise MachineLacks(
            "the gpu profile needs an NVIDIA driver and none is loaded; install it, or use the CPU: "
            "make setup PROFILE=cpu"
        )


def memory_bytes() -> "int | None":
    """Memory this process may use, bytes: the machine's, or a container's lower limit; None if unknown."""
    sizes = []
    for line in read_text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemTotal:"):
            sizes.append(int(line.split()[1]) * 1024)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        value = read_text(Path(limit)).strip()
        if value.isdigit():  # "max" means no limit
            sizes.append(int(value))
    return min(sizes) if sizes else None


def read_text(path: Path) -> str:
    """The file's text, or "" if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def fingerprint(profile: str, extras: "tuple[str, ...]" = ()) -> str:
    """Hash of the files that determine what is installed; if it changes, pip must run again."""
    digest = hashlib.sha256()
    for name in (f"requirements/{profile}.txt", "pyproject.toml", *(f"requirements/{extra}.txt" for extra in extras)):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def read_stamp() -> "dict[str, Any]":
    """The stamp of the current environment; {} if there is no valid stamp or no environment."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and PYTHON.exists() else {}


def write_stamp(profile: str, extras: "tuple[str, ...]", finished: bool) -> None:
    """Write the stamp atomically. It holds the path because the commands in .venv/bin contain it."""
    aside = STAMP.with_suffix(".tmp")
    stamp = {
        "profile": profile,
        "extras": list(extras),
        "path": str(ROOT),
        "fingerprint": fingerprint(profile, extras) if finished else None,
    }
    aside.write_text(json.dumps(stamp))
    aside.replace(STAMP)


def set_up(profile: str, wanted_extras: "tuple[str, ...]" = (), for_image: bool = False) -> None:
    """Make or repair `.venv` for `profile`, with the extras wanted and those it has already. Raises `MachineLacks`."""
    started = time.monotonic()
    former = read_stamp()
    same_place = (former.get("profile"), former.get("path")) == (profile, str(ROOT))
    extras = tuple(sorted({*wanted_extras, *(former.get("extras") or [])}))
    if same_place and former.get("fingerprint") == fingerprint(profile, extras):
        return
    preflight(profile, for_image)
    if extras:
        preflight_extras()
    requirements = ROOT / "requirements" / f"{profile}.txt"
    pins = [line.strip() for line in requirements.read_text().splitlines() if line.strip() and line[0] != "#"]

    say(1, f"virtual environment {VENV} (Python {platform.python_version()})")
    make_environment(clear=bool(former) and not same_place)
    write_stamp(profile, extras, finished=False)

    torch = next(pin for pin in pins if pin.startswith("torch=="))
    say(2, torch)
    install(["--no-deps", torch])
    if profile == "cpu":
        require_cpu_torch()

    say(3, f"the other {len(pins) - 1} pinned packages (a few minutes)")
    install(["--no-deps", "--requirement", str(requirements)])
    for extra in extras:
        print(f"setup: the extra {extra} (the first time, parts are compiled: about two minutes)", flush=True)
        install(["--no-deps", "--requirement", str(ROOT / "requirements" / f"{extra}.txt")])

    say(4, "coso-rl itself")
    install(["--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
    write_stamp(profile, extras, finished=True)
    print(f"setup: done in {time.monotonic() - started:.0f} s ({profile} profile)", flush=True)


def make_environment(clear: bool) -> None:
    """Create a virtual environment with a working pip; keep a working one unless `clear`."""
    works = PYTHON.exists() and run_quietly([str(PYTHON), "-m", "pip", "--version"]).returncode == 0
    same_python = works and (
        run_quietly([str(PYTHON), "-c", "import sys; print(*sys.version_info[:2])"]).stdout.split()
        == [str(part) for part in sys.version_info[:2]]
    )
    if clear or not works or not same_python:
        run_or_lack(
            [sys.executable, "-m", "venv", "--clear", str(VENV)],
            "the virtual environment could not be created; the lines above say why",
        )


def install(arguments: "list[str]") -> None:
    run_or_lack(
        [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *arguments],
        "pip failed; the lines above say why (most often the network, or an index that lacks a package); "
        "fix it and run make setup again, it keeps what is installed",
    )


def require_cpu_torch() -> None:
    """If pip chose a torch that was built for CUDA, uninstall it and raise `MachineLacks`."""
    built_for = run_quietly([str(PYTHON), "-c", TORCH_CUDA_VERSION])
    if built_for.returncode != 0:
        raise MachineLacks("torch was installed but cannot be found; remove .venv and run make setup again")
    if built_for.stdout.strip():
        # It would satisfy the pin, and the next set-up would keep it.
        run_quietly([str(PYTHON), "-m", "pip", "uninstall", "--yes", "torch"])
        raise MachineLacks(
            f"pip chose a torch built for CUDA {built_for.stdout.strip()}, the cpu profile needs the CPU build; "
            "set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels and repeat (with a GPU: make setup PROFILE=gpu)"
        )


def run_quietly(command: "list[str]") -> "subprocess.CompletedProcess[str]":
    """The command's result and output; exit code 126 if it cannot be started, for instance half written."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return subprocess.CompletedProcess(command, 126, "", "")


def run_or_lack(command: "list[str]", otherwise: str) -> None:
    # Some source builds run `python` by that name.
    path = os.pathsep.join([str(PYTHON.parent), os.environ.get("PATH", os.defpath)])
    if subprocess.run(command, cwd=str(ROOT), env={**os.environ, "PATH": path}).returncode != 0:
        raise MachineLacks(otherwise)


def say(step: int, text: str) -> None:
    print(f"setup [{step}/4] {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Set up .venv for coso-rl.")
    parser.add_argument(
        "--profile", choices=sorted(DISK_BYTES), help="default: the profile of the existing .venv, else cpu"
    )
    parser.add_argument(
        "--extras", nargs="*", default=[], choices=EXTRAS, help="optional engines of environments to install"
    )
    parser.add_argument(
        "--for-image", action="store_true", help="in a container image: do not check this machine's memory, CPU and GPU"
    )
    wanted = parser.parse_args()
    folder = os.open(str(ROOT), os.O_RDONLY)
    try:
        # If two run at once, the second one waits and then has nothing to do. The lock ends with the process.
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("setup: another set-up of this folder is running; waiting for it", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        set_up(wanted.profile or read_stamp().get("profile") or "cpu", tuple(wanted.extras), wanted.for_image)
    except MachineLacks as problem:
        print(f"setup: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run make setup again to continue", file=sys.stderr)
        return 130
    finally:
        os.close(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
