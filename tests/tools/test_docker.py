"""The Dockerfiles, as far as they can be checked without a container engine: no image is built here."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

import pytest

from tools import setup_machine

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted(setup_machine.DISK_BYTES)


def instructions(profile: str) -> list[tuple[str, list[str]]]:
    """(instruction, words) of a Dockerfile, comments left out and continued lines joined."""
    text = (ROOT / "docker" / f"{profile}.Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    statements = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(words[0], words[1:]) for words in map(shlex.split, statements) if words]


def arguments(profile: str, instruction: str) -> list[list[str]]:
    return [words for name, words in instructions(profile) if name == instruction]


def copied(profile: str) -> list[str]:
    """The sources of every COPY, without flags and without a slash at the end."""
    return [
        word.rstrip("/")
        for words in arguments(profile, "COPY")
        for word in [word for word in words if not word.startswith("--")][:-1]
    ]


def test_every_profile_has_a_dockerfile() -> None:
    assert sorted(path.name for path in (ROOT / "docker").glob("*.Dockerfile")) == [f"{p}.Dockerfile" for p in PROFILES]


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_copied_exists_and_is_not_ignored(profile: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line.removeprefix("!").rstrip("/") for line in ignore if line.startswith("!")}
    for source in copied(profile):
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in let_in, f".dockerignore keeps {source} out"


@pytest.mark.parametrize("profile", PROFILES)
def test_what_the_wheel_is_built_from_is_copied(profile: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = [pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    files = ["pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]]
    assert {*packages, *files} <= set(copied(profile))


@pytest.mark.parametrize("profile", PROFILES)
def test_base_images_have_a_tag_that_names_a_version(profile: str) -> None:
    for image, *_ in arguments(profile, "FROM"):
        _, separator, tag = image.partition(":")
        assert separator and tag[0].isdigit(), image


@pytest.mark.parametrize("profile", PROFILES)
def test_packages_come_from_the_profiles_pins_through_the_set_up_script(profile: str) -> None:
    runs = [" ".join(words) for words in arguments(profile, "RUN")]
    assert f"python tools/setup_machine.py --profile {profile} --for-image" in runs
    installs = [run for run in runs if "pip install" in run]
    assert installs and all("--no-deps" in run for run in installs)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_image_runs_coso_and_not_as_root(profile: str) -> None:
    names = [name for name, _ in instructions(profile)]
    (user,) = arguments(profile, "USER")
    assert user[0].isdigit() and int(user[0]) > 0
    assert names.index("USER") > max(index for index, name in enumerate(names) if name in ("RUN", "COPY"))
    (entry,) = arguments(profile, "ENTRYPOINT")
    assert "".join(entry) == "[/opt/coso-rl/.venv/bin/coso]"
