"""Get an environment's parser, to read utterances without an episode."""

from __future__ import annotations

from typing import Any

import gymnasium

import envs  # noqa: F401  registers ours
from envs.parsing import Parser


class NoParser(TypeError):
    """The environment has no parser."""


def action_parser(environment: str, kwargs: dict[str, Any]) -> Parser:
    """Return the parser of an environment; makes the environment and closes it again.

    environment: gymnasium id; `module:Name-v0` imports `module` first. kwargs: of the environment.
    Raises `NoParser` if it has no `parser`, and gymnasium's errors if it cannot be made.
    """
    made = gymnasium.make(environment, **kwargs)
    try:
        parser = getattr(made.unwrapped, "parser", None)
    finally:
        made.close()
    if parser is None:
        raise NoParser(
            f"{environment} has no parser, which exact influence needs: give it one (see envs.base.TextActionEnv), or "
            "choose another scoring.estimator"
        )
    return parser  # type: ignore[no-any-return]
