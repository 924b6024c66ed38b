"""The cache of scores is bounded, drops the least recently used entry, and never confuses two keys."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.pool.cache import ENTRY_OVERHEAD_BYTES, ScoreCache, score_key

LENGTH = 25
ENTRY = LENGTH * (4 + 4) + 4 + ENTRY_OVERHEAD_BYTES


def key(number, estimator="scm", weights="1"):
    return score_key(estimator, weights, np.full(LENGTH, number), np.array([0]))


def values(number):
    return np.full(LENGTH, number, np.float32)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60), st.integers(0, 4))
@settings(max_examples=200, deadline=None)
def test_keeps_the_most_recently_used_within_its_limit(operations, room):
    cache = ScoreCache(room * ENTRY)
    latest: list[int] = []  # the slow version: most recently used last
    for put, number in operations:
        if put:
            cache.put(key(number), values(number))
            latest = [n for n in latest if n != number] + [number]
            latest = latest[len(latest) - min(room, len(latest)) :]
        else:
            found = cache.get(key(number))
            assert (found is not None) == (number in latest)
            if found is not None:
                np.testing.assert_array_equal(found, values(number))
                latest = [n for n in latest if n != number] + [number]
    assert cache.entries == len(latest) and cache.nbytes == len(latest) * ENTRY


def test_a_key_consists_of_estimator_weights_action_and_ids():
    ids, labels = np.arange(3), np.array([1, -1])
    keys = {
        score_key("scm", "1", ids, labels),
        score_key("gradient", "1", ids, labels),
        score_key("scm", "2", ids, labels),
        score_key("scm", "1", ids[:2], labels),
        score_key("scm", "1", ids, np.array([1, 0])),
    }
    assert len(keys) == 5
    assert score_key("scm", "1", ids.astype(np.int64), labels.astype(np.int16)) in keys  # whatever the integer type


def test_entries_are_read_only_copies():
    cache = ScoreCache(1 << 20)
    mine = values(1)
    cache.put(key(1), mine)
    mine[:] = 9
    held = cache.get(key(1))
    assert held is not None and not held.flags.writeable
    np.testing.assert_array_equal(held, values(1))
