"""What a model's processor makes of each image: once per image, ahead of the passes that need it, in bounded room.

The tensors of a large screen take tens of megabytes, and those of a batch more memory than a rank has. So large ones
lie in files, which the operating system keeps in memory while there is room. The files have no names: their disk space
comes back when the rank ends, whatever ends it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from actors.chat import ChatProcessor
from actors.images import RecentImages, decode_png

#: Tensors of an image that take less are kept in memory, and together no more than `MEMORY_BYTES`.
LARGE_BYTES = 256 << 10
MEMORY_BYTES = 256 << 20
#: Tensors in a file begin at multiples of this.
ALIGNMENT = 64


class ImageTensors:
    """Tensors by the image's key. May be used by several threads; only one at a time runs the processor."""

    def __init__(self, chat: ChatProcessor, file_bytes: int, memory_bytes: int = MEMORY_BYTES) -> None:
        """file_bytes, memory_bytes: bounds on what is kept in files and in memory; what was used least recently goes
        first."""
        self._chat = chat
        self._file_bytes, self._memory_bytes = file_bytes, memory_bytes
        self._large: RecentImages[dict[str, Any]] = RecentImages(file_bytes)
        self._small: RecentImages[dict[str, Any]] = RecentImages(memory_bytes)
        self._looking = threading.Lock()
        self._encoding = threading.Lock()
        self.encoded = 0  # images that the processor has worked on

    def of(self, key: str, png: bytes) -> dict[str, Any]:
        """`ChatProcessor.encode_image` of an image; the tensors are not to be written to."""
        tensors = self._held(key)
        if tensors is None:
            with self._encoding:
                tensors = self._held(key)  # another thread may have been faster
                if tensors is None:
                    tensors = self._encode(key, png)
        return tensors

    def prepare(self, images: Mapping[str, bytes]) -> None:
        """Encode images that will be needed, in their order, up to half of the room: the rest is for those in use."""
        large, small = self._file_bytes // 2, self._memory_bytes // 2
        for key, png in images.items():
            size = nbytes(self.of(key, png))
            if size >= LARGE_BYTES:
                large -= size
            else:
                small -= size
            if min(large, small) < 0:
                return

    def _held(self, key: str) -> dict[str, Any] | None:
        with self._looking:
            small = self._small.get(key)
            return self._large.get(key) if small is None else small

    def _encode(self, key: str, png: bytes) -> dict[str, Any]:
        tensors = self._chat.encode_image(decode_png(png))
        self.encoded += 1
        size = nbytes(tensors)
        if size >= LARGE_BYTES:
            tensors = _in_file(tensors)
        with self._looking:
            (self._large if size >= LARGE_BYTES else self._small).put(key, tensors, size)
        return tensors


def nbytes(tensors: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in tensors.values() if isinstance(value, Tensor))


def _in_file(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors in the memory of a file without a name. Raises `OSError` where the disk has no room."""
    starts, end = {}, 0
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.numel():
            starts[name] = end
            end += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
    with tempfile.TemporaryFile() as file:
        try:
            # Takes the space now: a write to a page that the full disk has no room for would kill the process.
            os.posix_fallocate(file.fileno(), 0, end)
        except OSError as error:
            raise OSError(
                error.errno,
                f"no room for {end} bytes of a processed image in {tempfile.gettempdir()} ({error.strerror}): lower "
                "learner.image_cache_bytes, or set TMPDIR to a folder on a larger disk",
            ) from error
        memory = mmap.mmap(file.fileno(), end)
    moved = dict(tensors)
    for name, start in starts.items():
        value = tensors[name]
        moved[name] = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=start).view(value.shape)
        moved[name].copy_(value)
    return moved
