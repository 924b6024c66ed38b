"""Shaded utterances show every token with its number, and nothing in a token's text can act on page or terminal."""

import io
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from scoring.pictures import shade_ansi, shade_html

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


def test_html_escapes_what_a_model_may_write():
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
