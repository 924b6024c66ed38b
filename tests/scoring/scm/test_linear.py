"""The packed linear layer equals torch's own, and new weights replace the encoder's packed ones."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from scoring.scm import linear
from scoring.scm.encoder import CounterfactualEncoder, in_precision
from scoring.scm.linear import PackedLinear
from scoring.scm.model import StructuralCausalModel
from scoring.scm.shape import ScmSizes
from scoring.settings import ScmEncoderSettings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 700])
@pytest.mark.parametrize("has_onednn", [linear._HAS_ONEDNN, False])
def test_a_packed_layer_equals_that_of_torch(
    dtype: torch.dtype, rows: int, has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_HAS_ONEDNN", has_onednn)
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(24, 40, dtype=dtype), torch.randn(24, dtype=dtype), torch.randn(rows, 40, dtype=dtype)
    layer = PackedLinear(weight, bias, rows=512)
    expected = functional.linear(x.double(), weight.double(), bias.double())
    close = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-5}
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).double(), expected, **close)
        torch.testing.assert_close(layer.gelu(x).double(), functional.gelu(expected), **close)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_newly_loaded_weights_are_used_at_once(precision: str) -> None:
    torch.manual_seed(0)
    made_from = ScmEncoderSettings(hidden=16, layers=2, feedforward=32), ScmSizes(vocab_size=50, head_sizes=(3,))
    old, new = StructuralCausalModel(*made_from), StructuralCausalModel(*made_from)
    ids, positions, labels = np.arange(5, 15), np.array([0, 4]), np.array([1])

    def asked(scm: StructuralCausalModel) -> CounterfactualEncoder:
        return CounterfactualEncoder(scm, window=2, null_id=0, batch_tokens=64)

    encoder = asked(in_precision(old, "float32"))
    before = encoder.probabilities_minus_one(ids, positions, labels)
    old.load_state_dict(new.state_dict())
    in_precision(old, precision)
    after = encoder.probabilities_minus_one(ids, positions, labels)
    fresh = asked(in_precision(copy.deepcopy(new), precision)).probabilities_minus_one(ids, positions, labels)
    np.testing.assert_array_equal(after, fresh)
    assert np.abs(after - before).max() > 1e-3
