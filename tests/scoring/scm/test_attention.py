"""The scorers' attention equals the formula, computed for one sequence and one head at a time."""

import math

import pytest
import torch

from scoring.scm.attention import self_attention


def one_by_one(projected, sequences, heads):
    length, hidden = len(projected) // sequences, projected.shape[1] // 3
    width = hidden // heads
    mixed = torch.empty(len(projected), hidden, dtype=torch.float64)
    for sequence in range(sequences):
        rows = projected[sequence * length : (sequence + 1) * length].double()
        for head in range(heads):
            query, key, value = (rows[:, part * hidden + head * width :][:, :width] for part in range(3))
            weights = torch.softmax(query @ key.T / math.sqrt(width), dim=1)
            mixed[sequence * length : (sequence + 1) * length, head * width : (head + 1) * width] = weights @ value
    return mixed


# On both sides of a whole number of sixteens, below and beyond the length to which keys are filled up.
@pytest.mark.parametrize("length", [1, 3, 4, 15, 16, 17, 19, 20, 38, 47, 48, 255, 256, 263])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14), (torch.bfloat16, 3e-2)]
)
def test_equals_the_formula_at_every_length(length, dtype, tolerance):
    torch.manual_seed(length)
    projected = torch.randn(3 * length, 3 * 8, dtype=dtype)
    found = self_attention(projected, sequences=3, heads=2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), one_by_one(projected, 3, 2), rtol=0, atol=tolerance)


def test_a_sequence_does_not_depend_on_its_neighbours():
    projected = torch.randn(2 * 38, 3 * 8)
    both = self_attention(projected, sequences=2, heads=2)
    projected[38:] = torch.nan
    assert torch.equal(self_attention(projected, sequences=2, heads=2)[:38], both[:38])
