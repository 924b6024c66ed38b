"""Pictures of influence: an utterance with each token shaded by how much it decides the action (CoSo's B)."""

import html
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw
from rich.color import Color
from rich.style import Style
from rich.text import Text

from envs.drawing import monospaced_font

SHADE = (255, 140, 0)
"""Red, green, blue of full influence: an orange on which both black and white text can be read."""

BARS = " ▁▂▃▄▅▆▇█"


def shade_html(token_texts: Sequence[str], influence: ArrayLike) -> str:
    """Return one `<span class="utterance">` of HTML, with one shaded `<span>` per token, in order.

    The shade is translucent and the text keeps the page's colour, so it can be read on light and on dark pages. A
    token shows its influence as a tooltip. The texts are escaped.

    token_texts: the n tokens as text. influence: (n,) in [0, 1].
    Raises ValueError when the two differ in length or influence is not in [0, 1].
    """
    red, green, blue = SHADE
    spans = [
        f'<span style="background:rgba({red},{green},{blue},{0.8 * value:.3f});border-radius:2px" '
        f'title="influence {value:.3f}">{html.escape(text)}</span>'
        for text, value in _tokens(token_texts, influence)
    ]
    return f'<span class="utterance" style="white-space:pre-wrap;font-family:monospace">{"".join(spans)}</span>'


def shade_ansi(token_texts: Sequence[str], influence: ArrayLike) -> Text:
    """Return the utterance as rich text, black on a shade from white (0) to orange (1).

    It can be read on any terminal background; tokens without influence keep the terminal's own colours. Arguments and
    errors as for `shade_html`.
    """
    picture = Text()
    for text, value in _tokens(token_texts, influence):
        shade = Color.from_rgb(*(255 + (channel - 255) * value for channel in SHADE))
        picture.append(text, Style(color="black", bgcolor=shade) if value > 0 else None)
    return picture


def profile_line(profile: ArrayLike) -> str:
    """Return a profile of mean influence, (bins,) in [0, 1], as one line of bars, blank (0) to full (its largest)."""
    values = np.asarray(profile, dtype=np.float64)
    top = values.max(initial=0.0)
    return "".join(BARS[round(value / top * (len(BARS) - 1)) if top else 0] for value in values)


def shade_picture(
    answers: Sequence[tuple[str, Sequence[str], ArrayLike]], columns: int = 88, font_px: int = 18
) -> Image.Image:
    """Return a picture (RGB, white ground) of answers below one another, each under its title.

    Glyphs are those of DejaVu Sans Mono; a character it lacks shows as a box.

    answers: (title, n token texts, influence (n,) in [0, 1]) each. columns: characters in a line. font_px: their size.
    Errors as for `shade_html`.
    """
    font = monospaced_font(font_px)
    wide, high, margin = font.getlength("M"), int(font_px * 1.5), font_px
    placed: list[tuple[int, int, str, float | None]] = []
    row = 0
    for title, texts, influence in answers:
        placed.append((row, 0, _printable(title).replace("\n", " ")[:columns], None))
        row += 1
        for down, column, character, shade_of in _wrapped(_tokens(texts, influence), columns):
            placed.append((row + down, column, character, shade_of))
        row = placed[-1][0] + 2
    picture = Image.new("RGB", (int(columns * wide) + 2 * margin, max(1, row) * high + margin), "white")
    draw = ImageDraw.Draw(picture)
    for line, column, text, value in placed:
        x, y = margin + column * wide, margin + line * high
        if value:
            shade = tuple(round(255 + (channel - 255) * value) for channel in SHADE)
            draw.rectangle((x, y, x + wide, y + high - 4), fill=shade)
        draw.text((x, y + 2), text, font=font, fill=(110, 110, 110) if value is None else "black")
    return picture


def _wrapped(tokens: Sequence[tuple[str, float]], columns: int) -> Iterator[tuple[int, int, str, float]]:
    """Place every character of the tokens on a grid: (row, column, character, influence of its token)."""
    row = column = 0
    for text, value in tokens:
        # A token stays whole where it fits on a line.
        if column and len(text) <= columns < column + len(text):
            row, column = row + 1, 0
        for character in text:
            if character == "\n" or column == columns:
                row, column = row + 1, 0
            if character != "\n":
                yield row, column, " " if character == "\t" else character, value
                column += 1


def _tokens(token_texts: Sequence[str], influence: ArrayLike) -> list[tuple[str, float]]:
    values = np.asarray(influence, dtype=np.float64)
    if values.shape != (len(token_texts),):
        raise ValueError(f"{len(token_texts)} tokens need as many influences, not an array of shape {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"influence must be in [0, 1]: {values}")
    return [(_printable(text), float(value)) for text, value in zip(token_texts, values, strict=True)]


def _printable(text: str) -> str:
    """Replace characters that a page or a terminal could act on (control characters, lone surrogates) by U+FFFD."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}" for c in text
    )
