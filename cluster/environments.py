"""Making an environment by its id, with errors that say what is wrong and what there is."""

from __future__ import annotations

import difflib
from typing import Any

import gymnasium

import envs
from cluster.errors import CosoError
from envs.android.device import DeviceError


def make_environment(env_id: str, env_kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """`gymnasium.make`, where a mistake is a CosoError: an id that is unknown, or arguments that do not fit."""
    try:
        return gymnasium.make(env_id, **env_kwargs)
    except gymnasium.error.Error as error:
        ours = sorted(name for name in gymnasium.registry if name.startswith(f"{envs.NAMESPACE}/"))
        nearest = difflib.get_close_matches(env_id, gymnasium.registry, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise CosoError(f"no environment {env_id!r}: {hint}registered here: {', '.join(ours)} ({error})") from error
    except (TypeError, ValueError, ImportError, DeviceError) as error:
        raise CosoError(f"{env_id} cannot be made with {env_kwargs}: {error}") from error
