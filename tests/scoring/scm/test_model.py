"""The SCM's output depends on neither padding nor batch, and an action's probability is the product of its labels'."""

import numpy as np
import pytest
import torch

from scoring.scm.model import StructuralCausalModel, label_log_probability, labels_loss
from scoring.scm.shape import ScmSizes
from scoring.settings import ScmEncoderSettings
from scoring.utterances import padded

SETTINGS = ScmEncoderSettings(hidden=32, layers=2, heads=4, feedforward=64, max_tokens=16)


@pytest.fixture
def scm() -> StructuralCausalModel:
    torch.manual_seed(0)
    return StructuralCausalModel(SETTINGS, ScmSizes(vocab_size=40, head_sizes=(4, 7)))


@pytest.mark.parametrize("training", [True, False])
def test_scores_are_batch_invariant_in_float32(scm, training):
    scm.train(training)
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 40, n) for n in (1, 3, 16, 30, 7)]
    with torch.set_grad_enabled(training):
        together = scm.log_probabilities(*padded(rows, "cpu"))
        for i, row in enumerate(rows):
            ids, lengths = padded([row], "cpu")
            alone = scm.log_probabilities(ids, lengths)
            # Neither the padding's token nor its width matters.
            wide = torch.cat([ids, torch.full((1, 9), 33)], dim=1)
            for one, many, other in zip(alone, together, scm.log_probabilities(wide, lengths), strict=True):
                assert one.dtype == torch.float32
                assert (one[0].exp() - many[i].exp()).abs().max() < 1e-6
                assert (one[0].exp() - other[0].exp()).abs().max() < 1e-6


def test_order_of_tokens_matters_up_to_the_last_position_and_longer_utterances_are_defined(scm):
    base = np.arange(30) % 40
    swapped = base.copy()
    swapped[[1, 2]] = swapped[[2, 1]]
    late = base.copy()
    late[[28, 29]] = late[[29, 28]]  # both share the last position
    ids, lengths = padded([base, swapped, late], "cpu")
    first = scm.double().log_probabilities(ids, lengths)[0]
    assert (first[0] - first[1]).abs().max() > 1e-6
    assert (first[0] - first[2]).abs().max() < 1e-12


def test_action_probability_is_the_product_over_the_heads_that_apply(scm):
    ids, lengths = padded([np.arange(5)] * 3, "cpu")
    labels = torch.tensor([[2, 6], [2, -1], [-1, -1]])
    scm = scm.double()
    type_head, place_head = (p[0].exp() for p in scm.log_probabilities(ids, lengths))
    expected = torch.stack([type_head[2] * place_head[6], type_head[2], torch.ones(())])
    torch.testing.assert_close(scm.action_probability(ids, lengths, labels), expected, rtol=1e-12, atol=0)


def test_label_log_probability_and_loss_agree_with_log_softmax_over_the_whole_range():
    logits = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 30
    labels = torch.arange(50) % 7 - 1
    expected = torch.log_softmax(logits, -1).gather(1, labels.clamp(min=0)[:, None])[:, 0].where(labels >= 0, 0.0)
    torch.testing.assert_close(label_log_probability(logits, labels), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(labels_loss([logits, logits], torch.stack([labels, labels], 1)), -2 * expected)
    assert label_log_probability(torch.tensor([[3.0]]), torch.tensor([0])).item() == 0.0


def test_lengths_outside_the_batch_are_refused(scm):
    for length in (0, 4):
        with pytest.raises(ValueError, match="lengths"):
            scm.log_probabilities(torch.ones(1, 3, dtype=torch.int64), torch.tensor([length]))
