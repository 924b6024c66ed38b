"""Influence of every token of an utterance on the action it led to (CoSo, arXiv 2505.03792).

From a notebook: `scoring.influence(utterances, actions, settings, ...)`, `scoring.ScoringSettings(...)` and
`scoring.load_scm(checkpoint)`.
"""

from typing import TYPE_CHECKING, Any

from scoring.settings import ScoringSettings

if TYPE_CHECKING:
    from scoring.interactive import influence, load_scm

__all__ = ["ScoringSettings", "influence", "load_scm"]


def __getattr__(name: str) -> Any:
    # Pictures and statistics of influence need no torch, so it is imported when first asked for.
    if name in __all__:
        from scoring import interactive

        return getattr(interactive, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
