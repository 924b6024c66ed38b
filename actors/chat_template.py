"""The chat template of a model folder: where it is, and whether it always writes the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Any


class NotAVisionLanguageModel(ValueError):
    """The named path holds no Hugging Face vision-language model that this project can use."""


def chat_template(path: str, processor: Any) -> str:
    """The processor's, else the tokenizer's; of several templates the one named "default"."""
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise NotAVisionLanguageModel(
            f"model.path {path!r} has no chat template, so it is unknown how to write a prompt for it. "
            "Add chat_template.jinja to the model's folder."
        )
    return str(template)


def chance(template: str) -> str | None:
    """What makes a chat template random: the filter `random` or the function `lipsum`. None for any other template.

    The sandbox that renders it has no clock but `strftime_now`, no environment and no files.
    """
    from jinja2 import Environment

    tokens = [
        (kind, text)
        for _, kind, text in Environment().lex(template)
        if kind not in ("whitespace", "comment", "data", "raw_begin", "raw_end")
    ]
    for before, token in pairwise([("", ""), *tokens]):
        if token == ("name", "random") and before == ("operator", "|"):
            return "the filter 'random'"
        if token == ("name", "lipsum") and before != ("operator", "."):
            return "the function 'lipsum'"
    return None
