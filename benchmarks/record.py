"""How a benchmark writes down what it measured: with the command that made it, and the cores it had."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def record(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result as JSON, with `command` and `cores` before it, and return the whole."""
    module = Path(sys.argv[0]).stem
    whole = {
        "command": " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)),
        **result,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole
