"""Images as they travel and are stored: a key that depends on the pixels alone, and PNG bytes.

The environment's own process hashes and encodes its pictures, so the rollout worker's event loop does neither.
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from blake3 import blake3

from envs.png import decode_png as decode_png  # beside its counterpart, `encode_png`

Value = TypeVar("Value")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB_8_BIT = (8, 2, 0, 0, 0)  # bit depth, colour type, compression, filter method, no interlacing
#: One row of this many shows whether a picture can be compressed, and a picture that cannot is stored.
_SAMPLED_ROWS = 16
_WORTH_COMPRESSING = 0.95


class EncodedImage(NamedTuple):
    """A picture by the key of its pixels (`image_hash`), with its PNG bytes."""

    key: str
    png: bytes


def image_hash(image: np.ndarray) -> str:
    """Content hash (BLAKE3, 32 hex digits) of an image, uint8 (H, W, 3); shape is part of the content."""
    digest = blake3(str(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest(length=16)


def encode_png(image: np.ndarray) -> bytes:
    """image uint8 (H, W, 3) -> PNG bytes, the same for the same pixels. Raises ValueError for another array.

    Rows are not filtered: choosing a filter for each row, as Pillow does, takes two thirds of its time, and screens of
    flat colours and text become no smaller by it. `benchmarks/images.py` measures both.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image must be a uint8 array (H, W, 3), not {image.dtype} {image.shape}")
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = image.reshape(height, -1)
    sample = rows[::_SAMPLED_ROWS].tobytes()
    level = 1 if len(zlib.compress(sample, 1)) < _WORTH_COMPRESSING * len(sample) else 0
    header = struct.pack(">IIBBBBB", width, height, *_RGB_8_BIT)
    return b"".join(
        [
            _PNG_SIGNATURE,
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(rows.data, level)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return b"".join([struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)])


class RecentImages(Generic[Value]):
    """A value for each of the images seen last, by key; the least recently used go first.

    Two of the same capacity that are asked and filled in the same order hold the same keys. So an environment's process
    knows which images its host still has, without asking.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """capacity_bytes: bound on the sum of the sizes given to `put`. The last image stays even if it is larger."""
        self._capacity = capacity_bytes
        self._total = 0
        self._held: OrderedDict[str, tuple[Value, int]] = OrderedDict()

    def get(self, key: str) -> Value | None:
        """The value of an image, which then counts as the most recent one; None where it is not held."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def put(self, key: str, value: Value, size: int) -> None:
        """Hold the value of an image that is not held yet. size: its bytes."""
        self._held[key] = value, size
        self._total += size
        while self._total > self._capacity and len(self._held) > 1:
            _, (_, dropped) = self._held.popitem(last=False)
            self._total -= dropped


class PngEncoder:
    """Encodes images to PNG. It keeps recent results by content, so that an unchanged screen costs one hash.

    `capacity_bytes` bounds the size of this cache; the least recently used result is dropped first.
    """

    def __init__(self, capacity_bytes: int = 32 << 20) -> None:
        self._encoded: RecentImages[bytes] = RecentImages(capacity_bytes)

    def encode(self, image: np.ndarray) -> EncodedImage:
        """image uint8 (H, W, 3) -> (content hash, PNG bytes)."""
        key = image_hash(image)
        png = self._encoded.get(key)
        if png is None:
            png = encode_png(image)
            self._encoded.put(key, png, len(png))
        return EncodedImage(key, png)
