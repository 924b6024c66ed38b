"""Pictures of influence: an utterance with each token shaded by how much it decides the action (CoSo's B)."""

import html
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from rich.color import Color
from rich.style import Style
from rich.text import Text

SHADE = (255, 140, 0)
"""Red, green, blue of full influence: an orange that black and white text both stand out from."""


def shade_html(token_texts: Sequence[str], influence: ArrayLike) -> str:
    """Return one `<span class="utterance">` of HTML, with one shaded `<span>` per token, in order.

    The shade is translucent over whatever background the page has and the text keeps the page's colour, so
    it reads on light and on dark pages. Hovering a token shows its number. The texts are escaped, whatever
    they hold.

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

    It reads on any terminal background; tokens of no influence keep the terminal's own colours. Arguments and
    errors as for `shade_html`.
    """
    picture = Text()
    for text, value in _tokens(token_texts, influence):
        shade = Color.from_rgb(*(255 + (channel - 255) * value for channel in SHADE))
        picture.append(text, Style(color="black", bgcolor=shade) if value > 0 else None)
    return picture


def _tokens(token_texts: Sequence[str], influence: ArrayLike) -> list[tuple[str, float]]:
    values = np.asarray(influence, dtype=np.float64)
    if values.shape != (len(token_texts),):
        raise ValueError(f"{len(token_texts)} tokens need as many influences, not an array of shape {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"influence must be in [0, 1]: {values}")
    return [(_printable(text), float(value)) for text, value in zip(token_texts, values, strict=True)]


def _printable(text: str) -> str:
    """Replace what a page or a terminal could act on (control characters, lone surrogates) by U+FFFD."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}" for c in text
    )
