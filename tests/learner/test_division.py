"""However a minibatch is divided, every step is trained on once and ranks stay in step."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.division import assign_rows, dealt, divide, minibatches


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    micro_batch=st.integers(1, 9),
    micro_tokens=st.none() | st.integers(1, 200),
    world_size=st.integers(1, 5),
    data=st.data(),
)
def test_every_step_is_in_one_micro_batch_and_ranks_make_the_same_number(
    lengths, micro_batch, micro_tokens, world_size, data
):
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=0))
    indices, of_all = np.array(rows, np.int64), np.array(lengths)
    drawn = data.draw(st.lists(st.integers(0, world_size - 1), min_size=len(lengths), max_size=len(lengths)))
    for owners in (np.array(drawn), dealt(indices, of_all, micro_batch, world_size)):
        shares = [divide(indices, of_all, micro_batch, owners, rank, micro_tokens) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        counted = [index for share in shares for part in share if not part.filler for index in part.indices.tolist()]
        assert sorted(counted) == sorted(rows)
        for rank, share in enumerate(shares):
            for part in share:
                assert 1 <= len(part.indices) <= (1 if part.filler else micro_batch)
                assert part.filler or (owners[part.indices] == rank).all()
                padded = len(part.indices) * of_all[part.indices].max()
                assert micro_tokens is None or padded <= micro_tokens or len(part.indices) == 1
    assert (
        micro_tokens is not None or sum(part.filler for share in shares for part in share) < world_size
    )  # of those dealt out


def test_with_a_bound_on_tokens_fewer_passes_take_the_room_of_the_longest_steps():
    """As for screens with a history: a bound that is what a pass of eight of the longest would take."""
    lengths = np.random.default_rng(0).integers(700, 2800, 2048)
    rows, owners = np.arange(128), np.zeros(2048, np.int64)
    room = 8 * int(lengths[rows].max())
    by_count, by_tokens = divide(rows, lengths, 8, owners, 0), divide(rows, lengths, 128, owners, 0, room)
    for parts in (by_count, by_tokens):
        padded = [len(part.indices) * lengths[part.indices].max() for part in parts]
        assert max(padded) <= room and lengths[rows].sum() > 0.9 * sum(padded)
    assert len(by_count) == 16 and len(by_tokens) <= 12


@given(steps=st.integers(1, 150), size=st.integers(1, 40), epochs=st.integers(1, 4), world_size=st.integers(1, 5))
@settings(max_examples=50)
def test_rows_stay_with_one_rank_and_every_minibatch_is_spread_evenly(steps, size, epochs, world_size):
    sets = [rows for epoch in range(epochs) for rows in minibatches(steps, size, (1, epoch))]
    owners = assign_rows([np.arange(steps), *sets], np.arange(steps), world_size)
    assert owners.shape == (steps,) and owners.min() >= 0 and owners.max() < world_size
    for rows in sets:
        even = -(-len(rows) // world_size)
        assert np.bincount(owners[rows], minlength=world_size).max() <= even + 2


def test_four_ranks_have_less_than_two_percent_more_to_do_than_an_even_share():
    sets = [rows for epoch in range(4) for rows in minibatches(1024, 128, (1, epoch))]
    owners = assign_rows([np.arange(1024), *sets], np.arange(1024), 4)
    fullest = [np.bincount(owners[rows], minlength=4).max() for rows in sets]
    assert np.mean(fullest) < 1.02 * 128 / 4


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
