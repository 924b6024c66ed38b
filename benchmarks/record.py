"""Write the result of a benchmark with its command, commit and number of cores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def record(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write `command`, `commit`, `cores` and the result as JSON; returns what was written.

    The environment variable COMMIT names the code on a machine that has no git checkout of it.
    """
    module = ".".join(Path(sys.argv[0]).with_suffix("").relative_to(Path.cwd()).parts)
    whole = {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "commit": os.environ.get("COMMIT") or present_commit(),
        "cores": len(os.sched_getaffinity(0)),
        **result,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole


def present_commit() -> str:
    """Of this checkout."""
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
