"""Draw text with a font that ships with the project: the same pixels on every machine."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

#: DejaVu fonts and their licence. Cards, phones and pages are drawn with these and no others.
FONTS = Path(__file__).parent / "fonts"


@lru_cache(maxsize=8)
def bold_font(size_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Bold at a size in pixels."""
    return _font("DejaVuSans-Bold.ttf", size_px)


@lru_cache(maxsize=8)
def monospaced_font(size_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Mono at a size in pixels."""
    return _font("DejaVuSansMono.ttf", size_px)


def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine: the other one is not on every machine and places glyphs differently.
    return ImageFont.truetype(str(FONTS / name), size_px, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=256)
def text_block(text: str, size_px: int, colour: str, background: str) -> NDArray[np.uint8]:
    """A line of bold text on a plain background: read-only uint8 (H, W, 3), one line high and as wide as the text."""
    font = bold_font(size_px)
    ascent, descent = font.getmetrics()
    block = Image.new("RGB", (max(1, round(font.getlength(text))), ascent + descent), background)
    ImageDraw.Draw(block).text((0, 0), text, font=font, fill=colour)
    return read_only(block)


def read_only(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of an RGB picture as a shared read-only uint8 (H, W, 3) array."""
    pixels = np.asarray(image).copy()
    pixels.flags.writeable = False
    return pixels


def paste(canvas: NDArray[np.uint8], block: NDArray[np.uint8], x: int, y: int) -> None:
    """Paste a block with its top left corner at (x, y) of a canvas; parts beyond the canvas are cut off."""
    height, width = min(len(block), len(canvas) - y), min(block.shape[1], canvas.shape[1] - x)
    canvas[y : y + height, x : x + width] = block[:height, :width]


@lru_cache(maxsize=1024)
def text_strip(text: str, x: int, y: int, width: int, size_px: int) -> tuple[int, NDArray[np.uint8]]:
    """The rows that black text at (x, y) touches on a white canvas `width` wide.

    Returns the first row and a read-only uint8 (rows, width, 3) array; pasting it there equals drawing the
    text.
    """
    font = bold_font(size_px)
    top, bottom = (int(edge) for edge in font.getbbox(text)[1::2])
    canvas = Image.new("RGB", (width, y + bottom), "white")
    ImageDraw.Draw(canvas).text((x, y), text, font=font, fill="black")
    return y + top, read_only(canvas.crop((0, y + top, width, canvas.height)))
