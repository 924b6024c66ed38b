"""How much of a small update of adapters is left of it where it is served."""

import pytest
import torch

from learner.policy.weight_export import merged_weight


@pytest.mark.parametrize(("rank", "width"), [(128, 512), (16, 256)])
def test_merging_in_bfloat16_loses_most_of_a_first_update_and_adapters_do_not(rank, width):
    generator = torch.Generator().manual_seed(rank)
    weight = (torch.randn(width, width, generator=generator) * 0.02).bfloat16()
    low = ((torch.rand(rank, width, generator=generator) * 2 - 1) / width**0.5).bfloat16()
    up = 1e-5 * torch.randn(width, rank, generator=generator).sign()  # AdamW's first step
    trained = 2 * (up @ low.float())

    merged = merged_weight(weight, low, up, 2.0)
    served = merged.float() - weight.float()
    assert (merged == weight).float().mean() > 0.5
    assert (served - trained).norm() > 0.5 * trained.norm()

    as_adapters = 2 * (up.bfloat16().float() @ low.float())
    assert (as_adapters - trained).norm() < 0.01 * trained.norm()
    exact = merged_weight(weight.float(), low, up, 2.0) - weight.float()
    assert (exact - trained).norm() < 1e-3 * trained.norm()
