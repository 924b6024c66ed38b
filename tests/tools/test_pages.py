"""What the pages name exists: links, files, modules, `coso` commands and options, config keys, metrics, results."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import typer

import envs  # noqa: F401  registers ours
from benchmarks.off_policy import markdown
from cluster.cli.main import app
from cluster.config.changed_keys import CHANGED_KEYS
from cluster.config.files import valid_keys
from cluster.config.run_config import RunConfig
from cluster.telemetry.catalogue import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = [
    "actors",
    "benchmarks",
    "cluster",
    "configs",
    "docs",
    "envs",
    "examples",
    "learner",
    "requirements",
    "scoring",
    "tests",
    "tools",
]
METRICS = {metric.key for section in SECTIONS.values() for metric in section}
COMMANDS = typer.main.get_command(app)
#: Config keys whose value is a mapping of the user's.
FREE_KEYS = ("environment.kwargs.",)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def code(text: str) -> Iterator[str]:
    """The lines of code blocks (continued lines joined), and the inline code, of a page."""
    fenced = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for block in fenced.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    for inline in re.findall(r"`([^`]+)`", fenced.sub("", text)):
        yield " ".join(inline.split())


def broken_links(page: Path, text: str) -> list[str]:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in headings(path)):
            wrong.append(target)
    return wrong


def missing_files(text: str) -> list[str]:
    """Paths below our folders, wherever they stand, that are neither a file nor a metric; NAME stands for anything."""
    named = re.findall(rf"(?<![\w./:-])(?:\.\./)?((?:{'|'.join(FOLDERS)})/[\w./*-]*)", text)
    patterns = {re.sub(r"\b[A-Z]+\b", "*", path.rstrip(".")): path.rstrip(".") for path in named}
    metrics = "\n".join(METRICS)
    return [
        path
        for pattern, path in patterns.items()
        if not any(ROOT.glob(pattern.rstrip("/")))
        if not re.search(rf"^{re.escape(path).replace(re.escape('*'), '.*')}$", metrics, re.MULTILINE)
    ]


def unknown_modules(text: str) -> list[str]:
    """Modules after `python -m` that are not there."""
    named = {name.rstrip(".") for name in re.findall(r"python -m ([\w.]+)", text)}
    return sorted(name for name in named if importlib.util.find_spec(name) is None)


def unknown_environments(text: str) -> list[str]:
    return sorted(set(re.findall(r"\bcoso/\w+-v\d+", text)) - set(gymnasium.registry))


def wrong_commands(text: str) -> list[str]:
    """Uses of `coso` whose command or option does not exist."""
    wrong = []
    for line in code(text):
        for start in re.finditer(r"(?:^|&&|;)\s*coso (?=[a-z])", line):
            used = re.split(r"\s*(?:&&|;)\s*", line[start.end() :])[0]
            words = shlex.split(used.replace("…", ""), comments=True)
            try:
                command: Any = COMMANDS
                while words and (below := getattr(command, "commands", None)):
                    command = below[words.pop(0)]
                known = {"--help", *(option for parameter in command.params for option in parameter.opts)}
                options = {word.partition("=")[0] for word in words if word.startswith("--")}
                if not options <= known:
                    wrong.append(f"coso {used}: {sorted(options - known)}")
            except KeyError as error:
                wrong.append(f"coso {used}: {error}")
    return wrong


def unknown_keys(text: str) -> list[str]:
    """Config keys `section.key`, alone or with a value, that do not exist."""
    sections = "|".join(name for name in RunConfig.model_fields if any(k.startswith(f"{name}.") for k in valid_keys()))
    named = {key for line in code(text) for key in re.findall(rf"(?:^|\s)((?:{sections})\.[\w.]+)(?=[=:,]|\s|$)", line)}
    # The changelog names old keys beside the new ones.
    known = {*valid_keys(), *CHANGED_KEYS}
    return sorted(key for key in named if key not in known and not key.startswith(FREE_KEYS))


def unknown_metrics(text: str) -> list[str]:
    """Inline names of the form group/name whose group is one of metrics, and not one of our folders."""
    groups = {key.split("/")[0] for key in METRICS if "/" in key} - set(FOLDERS)
    named = {line for line in code(text) if re.fullmatch(rf"(?:{'|'.join(groups)})/\w+", line)}
    return sorted(named - METRICS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert broken_links(page, text) == []
    assert missing_files(text) == []
    assert unknown_modules(text) == []
    assert unknown_environments(text) == []
    assert wrong_commands(text) == []
    assert unknown_keys(text) == []
    assert unknown_metrics(text) == []


def test_what_does_not_exist_is_found() -> None:
    text = """[a](docs/nope.md) [b](docs/config.md#nope) `learner/nope.py` `benchmarks/results/nope.json`
    `python -m benchmarks.nope` `coso/Nope-v0` `coso trian x.yaml` `coso fleet nope` `scoring.windw` `fidelity/nope`

```sh
coso warmstart a.yaml && coso train a.yaml \\
    --nope training.updats=3   # a comment, it's --fine
```
"""
    assert broken_links(ROOT / "README.md", text) == ["docs/nope.md", "docs/config.md#nope"]
    assert missing_files(text) == ["docs/nope.md", "learner/nope.py", "benchmarks/results/nope.json"]
    assert unknown_modules(text) == ["benchmarks.nope"]
    assert unknown_environments(text) == ["coso/Nope-v0"]
    found = wrong_commands(text)
    assert [line.rpartition(": ")[2] for line in found] == ["['--nope']", "'trian'", "'nope'"]
    assert unknown_keys(text) == ["scoring.windw", "training.updats"]
    assert unknown_metrics(text) == ["fidelity/nope"]


def test_the_results_in_the_readme_are_those_of_the_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- results: begin -->")[1].split("<!-- results: end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert rows
    for config, file, _, seeds, before, after, minutes in rows:
        (path,) = re.findall(r"\((.*)\)", file)
        result = json.loads((ROOT / path).read_text(encoding="utf-8"))
        assert f"configs/{config}.yaml" in result["command"]
        runs = result["runs"]
        assert seeds == ", ".join(str(run["seed"]) for run in runs)
        assert before == f"{sum(run['success_before'] for run in runs) / len(runs):.3f}", config
        found = [run["success_after"] for run in runs]
        spread = "one seed" if len(found) == 1 else f"{min(found):.3f} to {max(found):.3f}"
        assert after == f"{sum(found) / len(found):.3f} ({spread})", config
        took = [f"{run['wall_seconds'] / 60:.1f}" for run in runs]
        assert minutes == (took[0] if len(took) == 1 else f"{min(took, key=float)} to {max(took, key=float)}"), config


def test_the_table_of_what_lag_costs_is_that_of_the_file() -> None:
    parts = re.split("<!-- off_policy: (?:begin|end) -->", (ROOT / "docs" / "algorithms.md").read_text("utf-8"))
    path = ROOT / "benchmarks" / "results" / "off_policy.json"
    if not path.exists():
        assert len(parts) == 1  # no table without a study
    else:
        assert parts[1].strip().splitlines()[2:] == markdown(json.loads(path.read_text("utf-8"))["by_game_and_lag"])


def test_pages_are_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120
    glossary = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Glossary\n")[1]
    rows = [line for line in glossary.split("\n## ")[0].splitlines() if line.strip()]
    assert len(rows) <= 20
