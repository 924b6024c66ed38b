"""However a minibatch is divided, every step is trained on once and ranks stay in step."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from learner.division import divide, minibatches


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    micro_batch=st.integers(1, 9),
    world_size=st.integers(1, 5),
    data=st.data(),
)
def test_every_step_is_in_one_micro_batch_and_ranks_make_the_same_number(lengths, micro_batch, world_size, data):
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=0))
    indices = np.array(rows, np.int64)
    shares = [divide(indices, np.array(lengths), micro_batch, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    counted = [index for share in shares for part in share if not part.filler for index in part.indices.tolist()]
    assert sorted(counted) == sorted(rows)
    for share in shares:
        assert sum(part.filler for part in share) <= 1
        for part in share:
            assert 1 <= len(part.indices) <= (1 if part.filler else micro_batch)


@given(steps=st.integers(1, 200), size=st.integers(1, 50), seed=st.integers(0, 10))
def test_minibatches_are_a_permutation_that_depends_on_the_seed_alone(steps, size, seed):
    parts = minibatches(steps, size, (seed, 1))
    assert sorted(np.concatenate(parts).tolist()) == list(range(steps))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1  # no small last one, which would be a whole optimizer step
    assert len(parts) == max(1, round(steps / size))
    for part, again in zip(parts, minibatches(steps, size, (seed, 1)), strict=True):
        np.testing.assert_array_equal(part, again)


def test_another_epoch_has_another_order():
    first, second = (np.concatenate(minibatches(100, 10, (1, epoch))) for epoch in (0, 1))
    assert not np.array_equal(first, second)
