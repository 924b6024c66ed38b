"""Find and make an environment by its id, and check what it returns. Errors say what is wrong and what exists."""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections.abc import Callable
from typing import Any

import gymnasium

import envs
from cluster.errors import CosoError
from envs.android.device import DeviceError
from envs.labels import LabelSpace
from envs.output import EnvironmentOutput, EnvironmentOutputError


def require_environment(env_id: str) -> None:
    """Check that `env_id` can be made here, without making it: its modules import and its name is registered.

    Raises CosoError that names the module, its own error and file:line, or the nearest registered id.
    """
    module, separator, name = env_id.rpartition(":")
    if separator:
        _import_module(module, env_id)
    spec = gymnasium.registry.get(name)
    if spec is None:
        if not any(known.startswith(f"{name}-v") for known in gymnasium.registry):  # an id may leave its version out
            raise CosoError(_unknown(env_id, name))
    elif isinstance(spec.entry_point, str):
        _import_module(spec.entry_point.partition(":")[0], env_id)


def make_environment(env_id: str, env_kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """`gymnasium.make` with mistakes as CosoError: an unknown id, a module that fails, arguments that do not fit, and
    in `reset` and `step` what the contract of `envs.base.TextActionEnv` does not allow."""
    require_environment(env_id)
    try:
        # Gymnasium's own checker stumbles over some of what ours names.
        made = gymnasium.make(env_id, disable_env_checker=True, **env_kwargs)
    except (gymnasium.error.Error, TypeError, ValueError, ImportError, DeviceError) as error:
        raise CosoError(f"{env_id} cannot be made with {env_kwargs}: {error}") from error
    label_space = getattr(made.unwrapped, "label_space", None)
    return _Checked(made, EnvironmentOutput(env_id, label_space)) if isinstance(label_space, LabelSpace) else made


class _Checked(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Checks and converts what an environment returns, as a run does."""

    def __init__(self, env: gymnasium.Env[Any, Any], output: EnvironmentOutput) -> None:
        super().__init__(env)
        self._output = output

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        returned = self.env.reset(seed=seed, options=options)
        return self._checked(lambda: self._output.reset(returned))

    def step(self, action: str) -> Any:
        returned = self.env.step(action)
        return self._checked(lambda: self._output.step(returned, action))

    def _checked(self, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except EnvironmentOutputError as error:
            raise CosoError(str(error)) from error


def _unknown(env_id: str, name: str) -> str:
    ours = sorted(name for name in gymnasium.registry if name.startswith(f"{envs.NAMESPACE}/"))
    nearest = difflib.get_close_matches(name, gymnasium.registry, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return f"no environment {env_id!r}: {hint}registered here: {', '.join(ours)}"


def _import_module(module: str, env_id: str) -> None:
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # the module is not ours: anything may happen in it
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name}; is its folder in PYTHONPATH?"
        else:
            reason = _with_place(error)
        raise CosoError(f"environment {env_id}: module {module} cannot be imported: {reason}") from error


def _with_place(error: BaseException) -> str:
    """One line: the error's type and message, and the file:line where it arose."""
    if isinstance(error, SyntaxError) and error.filename:
        message, file, line = error.msg, error.filename, error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        # The import machinery's own frames say nothing.
        last = [frame for frame in frames if not frame.filename.startswith("<frozen importlib")][-1]
        message, file, line = " ".join(str(error).split()), last.filename, last.lineno
    return f"{type(error).__name__}: {message} ({file}:{line})"
