"""PNG of others: decoded whole, or refused with one kind of error."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from actors.images import encode_png
from envs.png import LARGEST_PIXELS, UnreadableImage, decode_png

PICTURE = np.indices((20, 30)).sum(axis=0)[:, :, None].repeat(3, axis=2).astype(np.uint8)
PNG = encode_png(PICTURE)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_whole_picture() -> None:
    assert np.array_equal(np.asarray(decode_png(PNG)), PICTURE)


def other_format() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PICTURE).save(stream, "BMP")
    return stream.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        PNG[:40],
        PNG[:-40],
        other_format(),
        PNG[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 20, 1, 0, 0, 0, 0)) + b"\0\0\0\0iCCPIEND\xaeB`\x82",
        PNG[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, LARGEST_PIXELS // 9000 + 1, 8, 2, 0, 0, 0)) + PNG[33:],
    ],
    ids=["empty", "a header", "cut off", "another format", "an empty profile", "larger than any screen"],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableImage, match="bytes are not a complete picture"):
        decode_png(data)
