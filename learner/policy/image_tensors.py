"""What a model's processor makes of each image: once per image, ahead of the passes that need it, in bounded room.

The tensors of a large screen take tens of megabytes, and those of a batch more memory than a rank has. So large ones
lie in files, which the operating system keeps in memory while there is room. The files have no names: their disk space
comes back when the rank ends, whatever ends it.
"""

from __future__ import annotations

import mmap
import os
import queue
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
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
    """Tensors by the image's key. May be used by several threads."""

    def __init__(
        self, chat: ChatProcessor, file_bytes: int, memory_bytes: int = MEMORY_BYTES, threads: int = 1
    ) -> None:
        """file_bytes, memory_bytes: bounds on what is kept in files and in memory; what was used least recently goes
        first. threads: images that the processor works on at once, at most."""
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "images")
        self._idle: queue.SimpleQueue[ChatProcessor] = queue.SimpleQueue()
        for number in range(threads):
            self._idle.put(chat if number == 0 else chat.twin())
        self._file_bytes, self._memory_bytes = file_bytes, memory_bytes
        self._large: RecentImages[dict[str, Any]] = RecentImages(file_bytes)
        self._small: RecentImages[dict[str, Any]] = RecentImages(memory_bytes)
        self._looking = threading.Lock()
        self._coming: dict[str, Future[dict[str, Any]]] = {}  # of images that a thread works on
        self.encoded = 0  # images that the processor has worked on

    def of(self, key: str, png: bytes) -> dict[str, Any]:
        """`ChatProcessor.encode_image` of an image; the tensors are not to be written to."""
        with self._looking:
            small = self._small.get(key)
            held = self._large.get(key) if small is None else small
            if held is not None:
                return held
            coming = self._coming.get(key)
            if coming is None:
                mine: Future[dict[str, Any]] = Future()
                self._coming[key] = mine
        if coming is not None:
            return coming.result()
        try:
            tensors = self._encode(key, png)
            mine.set_result(tensors)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._looking:
                del self._coming[key]
        return tensors

    def of_all(self, images: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        """`of` each image, by its key; several are encoded at once."""
        run = map if self._threads == 1 else self._pool.map
        return dict(zip(images, run(self.of, images.keys(), images.values()), strict=True))

    def prepare(self, images: Mapping[str, bytes]) -> None:
        """Encode images that will be needed, in their order, up to half of the room: the rest is for those in use."""
        large, small = self._file_bytes // 2, self._memory_bytes // 2
        rest = iter(images.items())
        coming = deque(self._pool.submit(self.of, *image) for image in islice(rest, self._threads))
        while coming:
            size = nbytes(coming.popleft().result())
            if size >= LARGE_BYTES:
                large -= size
            else:
                small -= size
            if min(large, small) < 0:
                return
            coming.extend(self._pool.submit(self.of, *image) for image in islice(rest, 1))

    def _encode(self, key: str, png: bytes) -> dict[str, Any]:
        image = decode_png(png)
        chat = self._idle.get()
        try:
            tensors = chat.encode_image(image)
        finally:
            self._idle.put(chat)
        size = nbytes(tensors)
        if size >= LARGE_BYTES:
            tensors = _in_file(tensors)
        with self._looking:
            self.encoded += 1
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
