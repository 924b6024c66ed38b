"""Log-probabilities and entropies in chunks, against the same from all logits at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from learner.policy.token_logprobs import (
    LogitTransform,
    SamplingDistribution,
    TokenHead,
    UnsupportedHead,
    measured_transform,
)

WIDTH, VOCABULARY = 12, 50


def _problem(tokens, seed, bias=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    head.weight.data = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(5, VOCABULARY, (tokens,), generator=generator)
    return head, hidden, targets


def _slow(head, hidden, targets, temperature, banned, transform):
    """One token at a time, written as the definition has it, in the logits' full width."""
    logprobs, entropies = [], []
    for state, target in zip(hidden, targets, strict=True):
        logits = transform(head.weight @ state + (0 if head.bias is None else head.bias)) / temperature
        allowed = [index for index in range(VOCABULARY) if index not in banned]
        weights = (logits[allowed] - logits[allowed].max()).exp()
        p = weights / weights.sum()
        logprobs.append(p[allowed.index(int(target))].log())
        entropies.append(-(p * p.log()).sum())
    return torch.stack(logprobs), torch.stack(entropies)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 9),
    chunk=st.integers(1, 12),
    temperature=st.sampled_from([0.2, 1.0, 1.7]),
    banned=st.sets(st.integers(0, 4)),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.5]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_equal_the_unchunked_ones(tokens, chunk, temperature, banned, softcap, scale, bias, seed):
    head, hidden, targets = _problem(tokens, seed, bias)
    transform = LogitTransform(scale, softcap)
    expected = _slow(head, hidden, targets, temperature, banned, transform)
    weights = torch.linspace(-1, 2, tokens, dtype=torch.float64)

    def gradients(logprobs, entropies):
        total = (logprobs * weights).sum() + 0.3 * (entropies * weights.flip(0)).sum()
        return torch.autograd.grad(total, [hidden, *head.parameters()])

    expected_gradients = gradients(*expected)
    distribution = SamplingDistribution(temperature, sorted(banned), chunk)
    found = TokenHead.adopt(head, transform)(hidden, targets, distribution)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(*found), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [4, 100])
def test_logits_are_float32_when_the_model_is_bfloat16(chunk):
    """Logits of about 20, which bfloat16 would round by 0.06; gradients are right as far as bfloat16 goes."""
    head, hidden, targets = _problem(6, 0, bias=True, dtype=torch.bfloat16)
    head.weight.data *= 6
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    logits = torch.nn.functional.linear(*exact)
    assert 16 < logits.abs().amax(-1).mean() < 64
    expected = (logits / 0.2).log_softmax(-1)[torch.arange(6), targets]
    found, entropies = TokenHead.adopt(head, LogitTransform())(hidden, targets, SamplingDistribution(0.2, [], chunk))
    assert found.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=0)
    gradients = torch.autograd.grad(found.sum(), [hidden, head.weight, head.bias])
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, atol=0.02 * float(theirs.abs().max()), rtol=0)


def test_nothing_of_the_size_of_all_logits_is_kept_for_the_backward_pass():
    head, hidden, targets = _problem(64, 0)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    TokenHead.adopt(head, LogitTransform())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, entropies = head(hidden, targets, SamplingDistribution(1.0, [0], 8))
        assert all(tensor.shape[-1] != VOCABULARY for tensor in kept if tensor.ndim)
    (logprobs + entropies).sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_without_targets_it_is_the_head_it_was():
    head, hidden, _ = _problem(3, 0, bias=True)
    expected = head(hidden)
    assert torch.equal(TokenHead.adopt(head, LogitTransform(2.0))(hidden), expected)


def _text_model(name, **options):
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("Llama", {}, LogitTransform()),
        ("Gemma2", {"final_logit_softcapping": 30.0}, LogitTransform(softcap=30.0)),
        ("Cohere", {"logit_scale": 0.0625}, LogitTransform(scale=0.0625)),
        ("Granite", {"logits_scaling": 6.0}, LogitTransform(scale=1 / 6.0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_family_does_after_its_head_is_measured(name, options, expected, dtype):
    model = _text_model(name, **options).to(dtype)
    found = measured_transform(model, model.base_model, model.lm_head)
    assert found == expected


def test_a_family_that_scales_its_hidden_states_is_refused():
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    model = _text_model("MiniCPM3", **ranks)
    with pytest.raises(UnsupportedHead, match="MiniCPM3ForCausalLM"):
        measured_transform(model, model.base_model, model.lm_head)
