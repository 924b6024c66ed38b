"""What the installed vLLM can serve, as the tables in its source say.

They are read, not imported: importing vLLM takes four seconds and changes the process. Where a table is not found
(another version of vLLM, or none installed) the answer is None, and the engine itself has the last word.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

MODELS = "model_executor/models"


def architectures() -> frozenset[str] | None:
    """The names of architectures that vLLM has code for, as config.json names them."""
    tree = _source(f"{MODELS}/registry.py")
    if tree is None:
        return None
    tables = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    names = {key.value for table in tables for key in table.keys if isinstance(key, ast.Constant)}
    return frozenset(name for name in names if isinstance(name, str)) or None


def cpu_head_sizes() -> list[int] | None:
    """Widths of attention heads that the CPU build has kernels for."""
    tree = _source("v1/attention/backends/cpu_attn.py")
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes":
            for line in node.body:
                if isinstance(line, ast.Return) and isinstance(line.value, ast.List):
                    return list(ast.literal_eval(line.value))
    return None


def adapter_targets(architecture: str) -> frozenset[str] | None:
    """What vLLM's own class for an architecture applies adapters to: nothing, `language_model`, or `all-linear` too
    (the vision tower and the connector)."""
    for table in ast.walk(_source(f"{MODELS}/registry.py") or ast.Module([], [])):
        for key, value in zip(table.keys, table.values, strict=True) if isinstance(table, ast.Dict) else ():
            if isinstance(key, ast.Constant) and key.value == architecture and isinstance(value, ast.Tuple):
                module, name = ast.literal_eval(value)
                return _class_adapts(f"{MODELS}/{module}", name)
    return None


def _class_adapts(module: str, name: str) -> frozenset[str] | None:
    """As `adapter_targets`, of a class in a module (a path without ending): what it and its bases declare."""
    if name == "SupportsLoRA":
        return frozenset({"language_model"})
    path, tree = next(
        ((f"{module}{end}", tree) for end in (".py", "/__init__.py") if (tree := _source(f"{module}{end}"))), ("", None)
    )
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.ImportFrom) and any((each.asname or each.name) == name for each in node.names):
            return _class_adapts(_imported(path, node), name)
        if isinstance(node, ast.ClassDef) and node.name == name:
            declared = {
                target.id
                for line in node.body
                if isinstance(line, ast.Assign | ast.AnnAssign) and getattr(line.value, "value", None) is True
                for target in (line.targets if isinstance(line, ast.Assign) else [line.target])
                if isinstance(target, ast.Name)
            }
            inherited = [
                _class_adapts(module, base.id) or frozenset() for base in node.bases if isinstance(base, ast.Name)
            ]
            tower = {"all-linear"} if "supports_tower_connector_lora" in declared else set()
            return frozenset(tower).union(*inherited)
    return None


def _imported(path: str, statement: ast.ImportFrom) -> str:
    """The module that an import names, as a path in vLLM's folder without ending."""
    parts = (statement.module or "").split(".")
    if not statement.level:
        return "/".join(parts[1:])
    folder = path.split("/")[: -statement.level]
    return "/".join([*folder, *parts])


@cache
def _source(name: str) -> ast.Module | None:
    spec = importlib.util.find_spec("vllm")  # finds it without running it
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / name
    return ast.parse(file.read_text(encoding="utf-8")) if file.exists() else None
