"""The generated pages say what the code says, and are complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, PositiveInt

from cluster.config.files import valid_keys
from cluster.config.reference import config_markdown
from cluster.config.run_config import RunConfig
from cluster.telemetry.catalogue import SECTIONS
from tools.docs import DOCS, metrics_markdown, write_docs


def test_pages_on_disk_are_what_the_code_generates() -> None:
    mend = "run `make docs`"
    assert (DOCS / "config.md").read_text(encoding="utf-8") == config_markdown(RunConfig), mend
    assert (DOCS / "metrics.md").read_text(encoding="utf-8") == metrics_markdown(), mend


def test_every_config_key_has_its_row_or_its_section() -> None:
    page = config_markdown(RunConfig)
    rows = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    sections = set(re.findall(r"^## `([^`]+)`", page, re.MULTILINE))
    assert rows | sections == set(valid_keys())
    assert not rows & sections


def test_every_config_key_is_described() -> None:
    rows = [line.strip("| ").split(" | ") for line in config_markdown(RunConfig).splitlines() if line.startswith("| `")]
    # What can have one value only, like the name of an algorithm, says all there is to say.
    assert [row for row in rows if len(row) < 4 and row[1] != row[2].rstrip(" |")] == []


def test_types_ranges_and_defaults_are_in_words() -> None:
    class Inner(BaseModel):
        """What is inside."""

        width: PositiveInt = Field(3, description="How wide.")

    class Outer(BaseModel):
        """What is outside."""

        share: float = Field(0.5, ge=0, le=1, description="a | b")
        mode: Literal["on", "off"] | None = Field(None, description="Which.")
        sizes: tuple[PositiveInt, ...] = Field((1, 2), description="Several.")
        name: str = Field(description="Must be given.")
        inner: Inner = Inner()

    page = config_markdown(Outer)
    assert "| `share` | number ≥ 0, ≤ 1 | `0.5` | a \\| b |" in page
    assert "| `mode` | `on` or `off` or null | null | Which. |" in page
    assert "| `sizes` | list of integer > 0 | `[1, 2]` | Several. |" in page
    assert "| `name` | text | required | Must be given. |" in page
    assert "## `inner`\n\nWhat is inside.\n" in page
    assert "| `inner.width` | integer > 0 | `3` | How wide. |" in page


def test_every_metric_has_its_row(tmp_path: Path) -> None:
    _, page = write_docs(tmp_path)
    text = page.read_text(encoding="utf-8")
    for section in SECTIONS.values():
        for metric in section:
            assert f"| `{metric.key}` |" in text
