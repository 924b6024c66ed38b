"""A bounded cache of scores, so that identical (ids, action, SCM version) are scored once."""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

Key = tuple[str, str, bytes, bytes]

ENTRY_OVERHEAD_BYTES = 400
"""Memory of the Python objects of an entry, about."""


class ScoreCache:
    """Drops the least recently used entries once it holds more than `limit_bytes`; with 0 it keeps nothing.

    entries, nbytes: number of entries now, and their size.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.nbytes = 0
        self._limit = limit_bytes
        self._entries: OrderedDict[Key, NDArray[np.float32]] = OrderedDict()

    @property
    def entries(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> NDArray[np.float32] | None:
        """Return the values of the key, a read-only array, or None."""
        values = self._entries.get(key)
        if values is not None:
            self._entries.move_to_end(key)
        return values

    def put(self, key: Key, values: NDArray[np.float32]) -> None:
        """Keep a copy of values, float32 (n,), under the key."""
        values = values.copy()
        values.setflags(write=False)
        if (old := self._entries.pop(key, None)) is not None:
            self.nbytes -= _size(key, old)
        self._entries[key] = values
        self.nbytes += _size(key, values)
        while self.nbytes > self._limit:
            self.nbytes -= _size(*self._entries.popitem(last=False))


def score_key(estimator: str, weights: str, ids: NDArray[np.integer], labels: NDArray[np.integer]) -> Key:
    """Return everything that a score depends on. weights: the name of the SCM's weights, "" where no SCM is used."""
    return estimator, weights, ids.astype(np.int32).tobytes(), labels.astype(np.int32).tobytes()


def _size(key: Key, values: NDArray[np.float32]) -> int:
    return len(key[2]) + len(key[3]) + values.nbytes + ENTRY_OVERHEAD_BYTES
