"""Write the result of a benchmark with its command and number of cores."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def record(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write `command`, `cores` and the result as JSON; returns what was written."""
    module = Path(sys.argv[0]).stem
    whole = {
        "command": " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)),
        **result,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole
