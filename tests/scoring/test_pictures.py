"""Shaded utterances show every token and its influence; a token's text cannot act on the page or the terminal."""

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from scoring.pictures import SHADE, profile_line, shade_ansi, shade_html, shade_picture

anything = st.text(st.characters(), max_size=12)
tokens = st.lists(st.tuples(anything, st.floats(0, 1)), max_size=12)


class Reader(HTMLParser):
    """Reads back elements, titles and text the way a browser would."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.elements, self.titles, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data):
        self.text += data


def harmless(text):
    return "".join(
        c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000) else "�" for c in text
    )


@given(tokens)
@settings(max_examples=200, deadline=None)
def test_html_is_the_text_and_nothing_but_spans(pairs):
    page = shade_html([t for t, _ in pairs], [v for _, v in pairs])
    page.encode("utf-8")
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.elements == ["span"] * (len(pairs) + 1)
    assert reader.text == harmless("".join(t for t, _ in pairs))
    assert reader.titles == [f"influence {v:.3f}" for _, v in pairs]


def test_html_escapes_the_text_of_a_model():
    page = shade_html(['<script>alert("x")</script>', "'>&amp;"], [1.0, 0.0])
    assert "<script" not in page and "&lt;script&gt;" in page and "&amp;amp;" in page
    assert "rgba(255,140,0,0.800)" in page and "rgba(255,140,0,0.000)" in page


@given(tokens)
@settings(max_examples=100, deadline=None)
def test_terminal_text_is_the_text_without_control_characters(pairs):
    picture = shade_ansi([t for t, _ in pairs], [v for _, v in pairs])
    assert picture.plain == harmless("".join(t for t, _ in pairs))


def test_terminal_shades_by_influence_and_escape_sequences_do_not_pass():
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", width=80).print(
        shade_ansi(["none", "full", "\x1b[2J"], [0.0, 1.0, 0.0])
    )
    assert "48;2;255;140;0" in out.getvalue() and "\x1b[2J" not in out.getvalue()


@pytest.mark.parametrize(("texts", "values"), [(["a"], []), (["a"], [1.2]), (["a"], [float("nan")])])
def test_bad_input_is_refused(texts, values):
    for shade in (shade_html, shade_ansi):
        with pytest.raises(ValueError):
            shade(texts, values)


def test_a_picture_shades_each_tokens_own_characters_and_wraps_at_its_width():
    columns = 20
    texts, values = ["none ", "x" * 10, " full\n", "\x1b[2J", "y" * 30], [0.0, 1.0, 1.0, 0.0, 0.5]
    shaded = np.asarray(shade_picture([("title", texts, values)], columns=columns, font_px=16))
    blank = np.asarray(shade_picture([("title", texts, [0.0] * 5)], columns=columns, font_px=16))
    assert shaded.shape == blank.shape and shaded.dtype == np.uint8
    full = (shaded == np.array(SHADE)).all(axis=2)
    first = full[np.flatnonzero(full.any(axis=1))[0]]
    cell = first.sum() / 10  # only "x" * 10 is shaded there: " full" would not fit on the line, and stays whole
    assert 8 < cell < 12 and np.flatnonzero(first)[0] == pytest.approx(16 + 5 * cell, abs=2)
    half = (np.abs(shaded.astype(int) - [255, 198, 128]) <= 1).all(axis=2)
    lines = np.flatnonzero(np.diff(np.concatenate([[0], half.any(axis=1)]).astype(int)) == 1)
    assert len(lines) == 2  # 30 characters do not fit on a line of 20
    np.testing.assert_array_equal(shaded[:40], blank[:40])  # the title


def test_no_answers_make_an_empty_picture():
    assert shade_picture([]).size[1] > 0


def test_a_profile_line_has_one_bar_per_bin():
    assert profile_line([0.0, 0.5, 1.0]) == " ▄█" and profile_line([0.0, 0.0]) == "  " and profile_line([]) == ""
