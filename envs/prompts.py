"""The format of prompts and answers of all games with keywords: a flat JSON object, the action last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence


def answer_format(fields: Mapping[str, str], action_words: Sequence[str]) -> str:
    """The prompt's last sentence, which describes the JSON answer.

    fields: the fields before the action, name -> placeholder or advice, in order. Up to three action words are
    listed as alternatives; if there are more, the rest of the prompt must list them.
    """
    words = " or ".join(json.dumps(word) for word in action_words) if len(action_words) <= 3 else '"x"'
    shown = ", ".join(f"{json.dumps(name)}: {json.dumps(advice)}" for name, advice in fields.items())
    return f'Answer in JSON: {{{shown}, "action": {words}}}'


def json_answer(fields: Mapping[str, str], action: str) -> str:
    """An utterance in that format, as an expert writes it."""
    return json.dumps({**fields, "action": action}, ensure_ascii=False)
