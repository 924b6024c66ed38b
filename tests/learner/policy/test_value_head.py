"""The value head: what it sees of a prompt, where it starts, and a change of its unit."""

import pytest
import torch

from learner.policy.value_head import ValueHead

WIDTH = 16


def _head(attention, seed=0, hidden=(32,)):
    torch.manual_seed(seed)
    return ValueHead(WIDTH, hidden, attention)


def _with_noise(head):
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", [None, 8])
def test_a_value_depends_on_its_own_prompt_alone(attention, dtype):
    """Not on the answer after it, the padding, or the other rows."""
    head, lengths = _with_noise(_head(attention)), torch.tensor([3, 7, 5])
    hidden = torch.randn(3, 12, WIDTH).to(dtype)
    values = head(hidden, lengths)
    assert values.dtype == torch.float32 and values.shape == (3,)
    for row, length in enumerate(lengths.tolist()):
        alone = head(hidden[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(values[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", [None, 8])
def test_values_start_at_zero_and_a_change_of_unit_is_exact(attention):
    hidden, lengths = torch.randn(5, 6, WIDTH), torch.tensor([6, 2, 1, 4, 3])
    head = _head(attention)
    assert torch.equal(head(hidden, lengths), torch.zeros(5))
    head = _with_noise(head)
    before = head(hidden, lengths)
    head.rescale(2.5, -1.25)
    torch.testing.assert_close(head(hidden, lengths), 2.5 * before - 1.25)


def test_only_attention_sees_what_the_last_token_does_not_hold():
    """The return is a number that stands at some place of the prompt, marked; the last state knows nothing of it."""
    random = torch.Generator().manual_seed(1)

    def batch(count):
        hidden = torch.randn(count, 9, WIDTH, generator=random)
        place, value = torch.randint(0, 8, (count,), generator=random), torch.randn(count, generator=random)
        rows = torch.arange(count)
        hidden[:, :, 0] = 0.0
        hidden[rows, place, 0] = 4.0
        hidden[rows, place, 1] = value
        return hidden, torch.full((count,), 9), value

    def explained(attention):
        head = _head(attention)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        for _ in range(200):
            hidden, lengths, value = batch(64)
            optimizer.zero_grad()
            (head(hidden, lengths) - value).square().mean().backward()
            optimizer.step()
        hidden, lengths, value = batch(500)
        with torch.no_grad():
            return 1 - float((head(hidden, lengths) - value).var() / value.var())

    assert explained(None) < 0.2 and explained(16) > 0.7
