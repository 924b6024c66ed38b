"""Text in pictures, with a font that ships with a dependency: the same pixels on every machine."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont


@lru_cache(maxsize=8)
def bold_font(size_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Bold at a size in pixels, from the copy inside matplotlib, which is not imported for it."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the font DejaVuSans-Bold.ttf comes with matplotlib, which is not installed")
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    # The basic layout engine, because the other one is not on every machine and places glyphs otherwise.
    return ImageFont.truetype(str(path), size_px, layout_engine=ImageFont.Layout.BASIC)


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
    strip = np.asarray(canvas)[y + top :].copy()
    strip.flags.writeable = False
    return y + top, strip
