"""What the installed vLLM can serve, as the tables in its source say.

They are read, not imported: importing vLLM takes four seconds and changes the process. Where a table is not found
(another version of vLLM, or none installed) the answer is None, and the engine itself has the last word.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path


def architectures() -> frozenset[str] | None:
    """The names of architectures that vLLM has code for, as config.json names them."""
    tree = _source("model_executor/models/registry.py")
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


def _source(name: str) -> ast.Module | None:
    spec = importlib.util.find_spec("vllm")  # finds it without running it
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / name
    return ast.parse(file.read_text(encoding="utf-8")) if file.exists() else None
