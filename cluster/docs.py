"""The generated pages of `docs/`: every config key, from the models, and every metric, from the catalogue.

`python -m cluster.docs` (`make docs`) writes them; a test holds them to what the code says.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config import RunConfig
from cluster.config_files import section_of
from cluster.metric_catalogue import SECTIONS

DOCS = Path(__file__).resolve().parent.parent / "docs"


def config_markdown(model: type[BaseModel] = RunConfig) -> str:
    """`docs/config.md`: a table per section of the config, with key, type, default and meaning."""
    lines = [
        "# Config",
        "",
        "Generated from `cluster/config.py` by `coso config --docs`; do not edit.",
        "",
        "A run is described by one YAML file, by further files laid over it, and by `key.sub=value` words, in that",
        "order: `coso train configs/numberline.yaml my.yaml entropy.mode=uniform training.updates=40`. Unknown keys",
        "are errors. `coso train … --dry-run` prints what came out of it, and what it takes of the machine.",
        "",
    ]
    lines += _section(model, "The run", "")
    return "\n".join(lines).rstrip() + "\n"


def metrics_markdown() -> str:
    """`docs/metrics.md`: a table per section of the metric catalogue."""
    lines = [
        "# Metrics",
        "",
        "Generated from `cluster/metric_catalogue.py` by `make docs`; do not edit.",
        "",
        "`runs/NAME/metrics.jsonl` holds one JSON object per update, TensorBoard (and W&B where configured) the same",
        "numbers. What was not measured in an update is left out; what is not finite is null. In `sync` mode two runs",
        "of the same seed agree in every number but those of time, speed, memory, queues, bytes and caches.",
        "",
    ]
    for title, metrics in SECTIONS.items():
        lines += [f"## {title}", "", "| metric | meaning |", "|---|---|"]
        lines += [f"| `{metric.key}` | {_cell(metric.meaning)} |" for metric in metrics]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def write_docs(folder: Path = DOCS) -> list[Path]:
    """Write the generated pages into `folder` and return their paths."""
    pages = {"config.md": config_markdown(), "metrics.md": metrics_markdown()}
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in pages]


def _section(model: type[BaseModel], title: str, prefix: str) -> list[str]:
    """The table of a section's own keys, then the sections inside it."""
    lines = [f"## {title}", "", " ".join((model.__doc__ or "").split()), ""]
    own = {name: field for name, field in model.model_fields.items() if section_of(field.annotation) is None}
    if own:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(f"{prefix}{name}", field) for name, field in own.items()]
        lines.append("")
    for name, field in model.model_fields.items():
        if (inner := section_of(field.annotation)) is not None:
            key = f"{prefix}{name}"
            lines += _section(inner, f"`{key}`" + (" (null by default)" if field.default is None else ""), f"{key}.")
    return lines


def _row(key: str, field: FieldInfo) -> str:
    cells = (f"`{key}`", _type(field.annotation, field.metadata), _default(field), field.description or "")
    return f"| {' | '.join(map(_cell, cells))} |"


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A field's type and range in words: `integer > 0`, `none or uniform`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type(part, metadata) for part in arguments)
    if origin is tuple:
        several = "list of" if Ellipsis in arguments else f"{len(arguments)} ×"
        return f"{several} {_type(arguments[0])}"
    if origin is dict or annotation is dict:
        return "mapping"
    plain = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation))) + _range(metadata)


def _range(metadata: Sequence[Any]) -> str:
    """The bounds among a field's metadata; a `Field(...)` inside `Annotated` carries its own."""
    bounds: list[Any] = []
    for entry in metadata:
        bounds += entry.metadata if isinstance(entry, FieldInfo) else [entry]
    signs = {annotated_types.Gt: (">", "gt"), annotated_types.Ge: ("≥", "ge"), annotated_types.Le: ("≤", "le"),
             annotated_types.Lt: ("<", "lt")}  # fmt: skip
    parts = [
        f"{sign} {getattr(bound, name):g}"
        for bound in bounds
        if type(bound) in signs
        for sign, name in (signs[type(bound)],)
    ]
    return " " + ", ".join(parts) if parts else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def _cell(text: str) -> str:
    """Text that stays inside its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    for page in write_docs():
        print(page)
