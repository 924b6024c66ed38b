"""A bounded memory of what was scored, so that identical (ids, action, SCM version) are scored once."""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

Key = tuple[str, str, bytes, bytes]

ENTRY_OVERHEAD_BYTES = 400
"""About what Python's objects around an entry take."""


class ScoreCache:
    """Least recently used entries go first once `limit_bytes` are held; 0 remembers nothing.

    entries, nbytes: what is held now.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.nbytes = 0
        self._limit = limit_bytes
        self._held: OrderedDict[Key, NDArray[np.float32]] = OrderedDict()

    @property
    def entries(self) -> int:
        return len(self._held)

    def get(self, key: Key) -> NDArray[np.float32] | None:
        """Return the values kept under the key, which nobody may write to, or None."""
        values = self._held.get(key)
        if values is not None:
            self._held.move_to_end(key)
        return values

    def put(self, key: Key, values: NDArray[np.float32]) -> None:
        """Keep values, float32 (n,), under the key."""
        values = values.copy()
        values.setflags(write=False)
        if (old := self._held.pop(key, None)) is not None:
            self.nbytes -= _size(key, old)
        self._held[key] = values
        self.nbytes += _size(key, values)
        while self.nbytes > self._limit:
            self.nbytes -= _size(*self._held.popitem(last=False))


def score_key(estimator: str, weights: str, ids: NDArray[np.integer], labels: NDArray[np.integer]) -> Key:
    """What an utterance's score depends on; weights: names those of the SCM; "" where none is asked."""
    return estimator, weights, ids.astype(np.int32).tobytes(), labels.astype(np.int32).tobytes()


def _size(key: Key, values: NDArray[np.float32]) -> int:
    return len(key[2]) + len(key[3]) + values.nbytes + ENTRY_OVERHEAD_BYTES
