"""Weights by checkpoint name, for a family whose checkpoints pack them differently, and gathered only as needed."""

from contextlib import contextmanager

import torch
from safetensors.torch import load_file

from learner.policy.weight_export import checkpoint_weights


def _mixture_of_experts():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
            tie_word_embeddings=False,
        )
    )


def test_repacked_weights_are_those_of_save_pretrained_and_one_layer_is_whole_at_a_time(tmp_path):
    model = _mixture_of_experts()
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert any("experts.2" in name for name in expected), "the checkpoint holds experts one by one"
    whole = []

    @contextmanager
    def materialize(parameters):
        whole.append(sum(parameter.numel() for parameter in parameters))
        yield

    found = dict(checkpoint_weights(model, materialize))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(whole) == total and max(whole) < total / 2


def test_what_is_yielded_does_not_share_memory_with_the_model():
    model = _mixture_of_experts()

    @contextmanager
    def materialize(parameters):
        yield

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _, tensor in checkpoint_weights(model, materialize):
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
