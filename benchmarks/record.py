"""Write the result of a benchmark with its command, commit and number of cores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def record(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write `command`, `commit`, `cores` and the result as JSON; returns what was written."""
    module = Path(sys.argv[0]).stem
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    whole = {
        "command": " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "cores": len(os.sched_getaffinity(0)),
        **result,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole
