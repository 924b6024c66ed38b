"""Reads PNG that others made: devices, servers, run folders."""

from __future__ import annotations

import io
import warnings

from PIL import Image, PngImagePlugin

#: Pixels of the largest picture that is decoded: four times a screen of 3840 × 2160.
LARGEST_PIXELS = 1 << 25

# `decode_png` refuses such pictures itself. Once and not around each call, since threads share the filters.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(ValueError):
    """Bytes that are no complete PNG of a size that a screen may have."""


def decode_png(data: bytes) -> Image.Image:
    """PNG bytes -> an RGB picture. Raises `UnreadableImage`."""
    try:
        # Only PNG, so that the bytes cannot reach other decoders.
        with Image.open(io.BytesIO(data), formats=[PngImagePlugin.PngImageFile.format]) as picture:
            if picture.width * picture.height > LARGEST_PIXELS:  # a header of 33 bytes can ask for gigabytes
                raise ValueError(f"it has {picture.width} × {picture.height} pixels")
            return picture.convert("RGB")
    except Exception as error:  # Pillow raises half a dozen kinds, IndexError and struct.error among them
        raise UnreadableImage(f"{len(data)} bytes are not a complete picture: {error}") from None
