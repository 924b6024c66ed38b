"""An environment's parser on its own: what an utterance means there, without an episode."""

from __future__ import annotations

from typing import Any

import gymnasium

import envs  # noqa: F401  registers ours
from envs.parsing import Parser


class NoParser(TypeError):
    """An environment does not say how it reads utterances."""


def action_parser(environment: str, kwargs: dict[str, Any]) -> Parser:
    """Return the parser of an environment, which is made for it and closed again.

    environment: gymnasium id; `module:Name-v0` imports `module` first. kwargs: of the environment.
    Raises `NoParser` where it has no `parser`, and what gymnasium raises where it cannot be made.
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
