"""A small share of `python -m tools.families`: the learner's side of each family, also in another form of its chat."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.families.__main__ import BEGIN, PAGE, REASON, cell
from tools.families.catalogue import FAMILIES
from tools.families.checks import FORMS, action_span, in_form, logprobs_equal_generation, sharpened

#: The learner refuses these, and says why.
REFUSED = {"blip-2": "no linear output head on a base model"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_learner_says_what_generate_says(family: str, tmp_path: Path) -> None:
    tiny = sharpened(FAMILIES[family](tmp_path))
    action_span(tiny.chat)
    if family in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family]):
            logprobs_equal_generation(tiny, tiny.chat)
    else:
        forms = list(FORMS)
        form = forms[list(FAMILIES).index(family) % len(forms)]
        logprobs_equal_generation(tiny, in_form(tiny, form))


def test_the_page_has_a_row_for_every_family() -> None:
    rows = PAGE.read_text(encoding="utf-8").split(BEGIN)[1]
    assert [family for family in FAMILIES if f"| `{family}` |" not in rows] == []


def test_a_cell_breaks_no_table() -> None:
    assert cell("a | b\n<c>") == r"a \| b \<c>"
    assert len(cell("word " * 100)) <= REASON
