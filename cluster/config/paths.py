"""Paths of a config, made absolute before a run begins: it may be resumed from another working folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cluster.config.run_config import RunConfig
from envs.settings import EnvironmentSettings


def absolute_paths(config: RunConfig) -> RunConfig:
    """The config with every path absolute, seen from the present working folder.

    The name of a hub model stays as it is, and so does the path of a model that is not there.
    """
    model, warm = config.model, config.warm_start
    changes: dict[str, str] = {"output": _absolute(warm.output)}
    if warm.demonstrations_from:
        changes["demonstrations_from"] = _absolute(warm.demonstrations_from)
    return config.model_copy(
        update={
            "folder": _absolute(config.folder),
            "model": model.model_copy(update={"path": _absolute(model.path)}) if os.path.exists(model.path) else model,
            "warm_start": warm.model_copy(update=changes),
            "environment": _environment(config.environment),
        }
    )


def _environment(settings: EnvironmentSettings) -> EnvironmentSettings:
    kwargs = {key: _argument(value) for key, value in settings.kwargs.items()}
    if settings.id == "coso/ALFWorld-v0":
        from envs.alfworld.games import games_folder

        kwargs["games"] = _absolute(str(games_folder(kwargs.get("games"))))  # also from ALFWORLD_DATA, and the default
    return settings.model_copy(update={"kwargs": kwargs})


def _argument(value: Any) -> Any:
    """An environment's argument. A text that looks like a path and names something is one."""
    if isinstance(value, str) and ("/" in value or Path(value).suffix) and os.path.exists(value):
        return _absolute(value)
    return value


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
