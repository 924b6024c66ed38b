"""Draw playing cards: a large rank over a large suit, so that both are readable at a few pixels.

The deck has four colours (spades black, hearts red, diamonds blue, clubs green), because a club and a spade of eight
pixels look the same. The rank is in the left half, which stays visible when cards overlap.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from envs.cards.deck import rank_name
from envs.drawing import bold_font, paste, read_only, text_block

FELT = "#35654d"
CARD_ASPECT = 1.4  # height / width

_SUITS = {"C": ("♣", "#0a7d32"), "D": ("♦", "#1248c8"), "H": ("♥", "#d01020"), "S": ("♠", "#101010")}
_OVERSAMPLING = 4


@lru_cache(maxsize=256)
def card_picture(code: str, width: int) -> NDArray[np.uint8]:
    """A card, face up, `width` pixels wide, on the table's colour: shared read-only uint8 (1.4 * width, width, 3)."""
    suit, colour = _SUITS[code[0]]
    image, draw, (w, h) = _blank(width, "white")
    name = rank_name(code)
    _glyph(image, name, colour, (0.05 * w, 0.04 * h, (0.66 if name == "10" else 0.56) * w, 0.5 * h))
    _glyph(image, suit, colour, (0.34 * w, 0.53 * h, 0.95 * w, 0.95 * h))
    return _shrunk(image, width)


@lru_cache(maxsize=8)
def card_back(width: int) -> NDArray[np.uint8]:
    """A card, face down; as `card_picture`."""
    image, draw, (w, h) = _blank(width, "white")
    draw.rounded_rectangle((0.08 * w, 0.06 * h, 0.92 * w, 0.94 * h), 0.06 * w, fill="#7a2f8f")
    for column in range(6):
        for row in range(9):
            left, top = (0.1 + 0.14 * column) * w, (0.075 + 0.1 * row) * h
            draw.ellipse((left, top, left + 0.09 * w, top + 0.09 * w), fill="#d9b3e6")
    return _shrunk(image, width)


@lru_cache(maxsize=8)
def table(labels: tuple[tuple[str, int, tuple[int, int]], ...], side: int = 300) -> NDArray[np.uint8]:
    """An empty table with labels (text, size in pixels, position): shared read-only uint8 (side, side, 3)."""
    felt = np.asarray(Image.new("RGB", (side, side), FELT)).copy()
    for text, size_px, (x, y) in labels:
        paste(felt, text_block(text, size_px, "white", FELT), x, y)
    felt.flags.writeable = False
    return felt


def _blank(width: int, colour: str) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, int]]:
    w, h = _OVERSAMPLING * width, _OVERSAMPLING * round(CARD_ASPECT * width)
    image = Image.new("RGB", (w, h), FELT)
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, w - 1, h - 1), 0.08 * w, fill=colour, outline="#404040", width=_OVERSAMPLING)
    return image, draw, (w, h)


def _glyph(image: Image.Image, text: str, colour: str, box: tuple[float, float, float, float]) -> None:
    """Draw text that fills the height of a box (left, top, right, bottom), or its width if the text is wider."""
    left, top, right, bottom = (round(edge) for edge in box)
    font = bold_font(round(1.5 * (bottom - top)))
    ink = font.getbbox(text)
    size = (round(ink[2] - ink[0]), round(ink[3] - ink[1]))
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).text((-ink[0], -ink[1]), text, font=font, fill=255)
    fitted = (min(right - left, round(size[0] * (bottom - top) / size[1])), bottom - top)
    image.paste(colour, (left, top), mask.resize(fitted, Image.Resampling.LANCZOS))


def _shrunk(image: Image.Image, width: int) -> NDArray[np.uint8]:
    height = round(CARD_ASPECT * width)
    return read_only(image.resize((width, height), Image.Resampling.LANCZOS))
