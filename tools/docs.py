"""Generate pages of `docs/`: all config keys, from the models, and all metrics, from the catalogue.

`python -m tools.docs` (`make docs`) writes them; a test compares them with the code.
"""

from __future__ import annotations

from pathlib import Path

from cluster.config.reference import config_markdown, table_cell
from cluster.telemetry.catalogue import SECTIONS

DOCS = Path(__file__).resolve().parent.parent / "docs"


def metrics_markdown() -> str:
    """The text of `docs/metrics.md`: a table per section of the metric catalogue."""
    lines = [
        "# Metrics",
        "",
        "Generated from `cluster/telemetry/catalogue.py` by `make docs`; do not edit.",
        "",
        "`runs/NAME/metrics.jsonl` holds one JSON object per update, TensorBoard (and W&B where configured) the same",
        "metrics. An update leaves out what it did not measure; values that are not finite are null. In `async` mode,",
        "the evaluation of an update is one more object with the same `update`, which follows once it is over.",
        "In `sync` mode, two runs with the same seed agree in all metrics except time, speed, memory, queues, bytes",
        "and caches.",
        "",
    ]
    for title, metrics in SECTIONS.items():
        lines += [f"## {title}", "", "| metric | meaning |", "|---|---|"]
        lines += [f"| `{metric.key}` | {table_cell(metric.meaning)} |" for metric in metrics]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def write_docs(folder: Path = DOCS) -> list[Path]:
    """Write the generated pages into `folder` and return their paths."""
    pages = {"config.md": config_markdown(), "metrics.md": metrics_markdown()}
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in pages]


if __name__ == "__main__":
    for page in write_docs():
        print(page)
