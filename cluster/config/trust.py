"""Run folders of others are data: what their config would execute or connect to is named and confirmed first.

A config may name code (`module:Name`), a program, or a server. In a config file that a user wrote, that is the user's
wish. A run folder may come from somebody else, so it is asked about, unless this user has started a run with the same
name, or has confirmed it before. Both are remembered in the user's state folder, with the file that the module is in.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import CosoError

_CODE = re.compile(r"[^\W\d][\w.-]*:[^\W\d][\w./-]*")
#: Arguments that `envs.android` imports, however they are written.
_IMPORTED = frozenset({"driver", "evaluator"})
#: Arguments of environments at any depth: a program that is run, and where a key from the environment is sent.
_PROGRAMS_AND_SERVERS = frozenset({"browser", "url", "api_key_variable"})
#: What lies beside the config.yaml of a run folder.
_OF_A_RUN = ("metrics.jsonl", "checkpoints", "trajectories", "tensorboard", "lock")


def is_of_a_run(file: Path) -> bool:
    """Whether a config file is that of a run folder."""
    return file.name == "config.yaml" and any((file.parent / name).exists() for name in _OF_A_RUN)


def named_code(values: dict[str, Any]) -> list[str]:
    """What a config's values name of code, programs and servers: "module:Name", or "key=value"."""
    found = []
    for section, key in (("environment", "id"), ("algorithm", "name")):
        value = _section(values, section).get(key)
        if isinstance(value, str) and ":" in value:
            found.append(value)
    found += _in_arguments(_section(values, "environment").get("kwargs"), "")
    address = _section(values, "cluster").get("address")
    if address not in (None, "auto", "local"):
        found.append(f"cluster.address={address}")
    return list(dict.fromkeys(found))


def require_trusted(file: Path, values: dict[str, Any], trusted: Sequence[str]) -> None:
    """Raise `CosoError` if the config of a run folder names what this user has neither run nor confirmed.

    trusted: names that are confirmed now, and from now on.
    """
    named = named_code(values)
    remember([name for name in named if name in trusted])
    known = _read()
    if unknown := [name for name in named if name not in trusted and known.get(name) != _origin(name)]:
        options = " ".join(f"--trust '{name}'" for name in unknown)
        raise CosoError(
            f"{file} names code or servers that you have not used before: {', '.join(unknown)}. If you trust who made "
            f"this run, repeat the command with {options}"
        )


def remember(names: Sequence[str]) -> None:
    """Remember that this user runs these. Where the state folder cannot be written, the question comes again."""
    known = _read()
    new = {name: _origin(name) for name in names}
    if new.items() <= known.items():
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home
        path = _state_file()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        aside.write_text(json.dumps({**known, **new}, indent=1), encoding="utf-8")
        aside.rename(path)


def _in_arguments(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _in_arguments(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _in_arguments(inner, key)
    elif key in _PROGRAMS_AND_SERVERS and value is not None:
        yield f"{key}={value}"
    elif isinstance(value, str) and (_CODE.fullmatch(value) or key in _IMPORTED and ":" in value):
        yield value


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _origin(name: str) -> str:
    """The file of a name's top module, found without importing it; "" for what is no module."""
    module = name.partition(":")[0].partition(".")[0]
    try:
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return ""
    return spec.origin or ":".join(spec.submodule_search_locations or ())


def _state_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "coso-rl" / "trusted.json"


def _read() -> dict[str, str]:
    try:
        known = json.loads(_state_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return known if isinstance(known, dict) else {}
