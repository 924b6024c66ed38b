"""An environment's parser on its own: what an utterance would mean there, without an episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium

from envs.labels import ParsedAction

Parser = Callable[[str], ParsedAction]
"""What an utterance means; depends on nothing but the utterance."""


class NoParser(TypeError):
    """An environment cannot say what an utterance means before it is acted on."""


def action_parser(environment: str, kwargs: dict[str, Any]) -> Parser:
    """Return the `parse` of an environment that is made for it and never reset.

    environment: gymnasium id; `module:Name-v0` imports `module` first. kwargs: of the environment.
    Raises `NoParser` where it has no `parse(utterance)`, and what gymnasium raises where it cannot be made.
    """
    import envs  # noqa: F401  registers ours

    made = gymnasium.make(environment, **kwargs).unwrapped
    parse = getattr(made, "parse", None)
    if not callable(parse):
        raise NoParser(
            f"{environment} has no parse(utterance), which exact influence needs: give it one (see "
            "envs.base.TextActionEnv), or choose another scoring.estimator"
        )
    return parse  # type: ignore[no-any-return]
