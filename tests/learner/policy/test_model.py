"""The policy model: what it trains, what it needs, how it starts."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from actors.chat import NotAVisionLanguageModel
from learner.policy.attention import UnsupportedAttention, attention_choices
from learner.policy.batch import BatchBuilder
from learner.policy.model import load_policy
from learner.settings import LoraSettings
from tests.tiny_models import PROMPT, TEXTS, make_idefics3, picture
from tests.tiny_steps import steps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_idefics3(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="module")
def batch(tiny):
    responses = [tiny.chat.tokenizer(text)["input_ids"] for text in TEXTS]
    trajectories = steps(tiny.chat, [PROMPT] * 3, [picture(n) for n in range(3)], responses)
    return BatchBuilder(tiny.chat).build(trajectories, [0, 1, 2])


def _load(tiny, **options):
    defaults = {
        "dtype": torch.float32,
        "lora": None,
        "value_hidden": (16, 8),
        "gradient_checkpointing": False,
        "value_gradient": True,
        "seed": 5,
    }
    return load_policy(tiny.chat.path, **{**defaults, **options})


def _parameters(policy):
    return [*policy.parameters(), *policy.value_head.parameters()]


def _run(policy, batch, chunk=16):
    return policy(batch, temperature=1.0, banned_token_ids=[0, 2, 3], token_chunk=chunk)


def test_values_start_at_zero_and_the_same_seed_starts_alike(tiny, batch):
    first, second, third = _load(tiny), _load(tiny), _load(tiny, seed=6)
    assert torch.equal(_run(first, batch).values, torch.zeros(3))
    same, other = (
        [torch.equal(a, b) for a, b in zip(_parameters(first), _parameters(policy), strict=True)]
        for policy in (second, third)
    )
    assert all(same) and not all(other)


def test_the_value_is_that_of_the_last_prompt_token(tiny, batch):
    policy = _load(tiny).eval()
    torch.nn.init.normal_(policy.value_head.mlp[-1].weight)
    with torch.no_grad():
        values = _run(policy, batch).values
        for row, length in enumerate(batch.prompt_lengths.tolist()):
            inputs = {name: tensor[row : row + 1] for name, tensor in batch.model_inputs.items()}
            inputs["input_ids"] = inputs["input_ids"][:, :length]
            del inputs["attention_mask"]
            hidden = policy.hf_model.model(**inputs)
            expected = policy.value_head.mlp(hidden.last_hidden_state[0, -1])[0]
            torch.testing.assert_close(values[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value_gradient", [True, False])
def test_whether_the_value_trains_the_trunk_is_a_choice(tiny, batch, value_gradient):
    policy = _load(tiny, value_gradient=value_gradient)
    torch.nn.init.normal_(policy.value_head.mlp[-1].weight)
    _run(policy, batch).values.sum().backward()
    assert policy.value_head.mlp[0].weight.grad.abs().sum() > 0
    assert any(p.grad is not None for p in policy.vlm.parameters()) == value_gradient


def test_logits_of_the_whole_batch_never_exist(tiny, batch):
    vocabulary = tiny.model.config.text_config.vocab_size
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal largest
            result = operation(*args, **(kwargs or {}))
            for tensor in tree_flatten(result)[0]:
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (vocabulary,):
                    largest = max(largest, tensor.numel())
            return result

    policy = _load(tiny)
    with Watch():
        output = _run(policy, batch, chunk=4)
        (output.logprobs.sum() + output.entropy.sum()).backward()
    weight = policy.hf_model.lm_head.weight.numel()  # its transpose ends in the vocabulary too
    assert batch.response_mask.sum() > 40
    assert largest == max(4 * vocabulary, weight)


def test_recomputing_activations_changes_nothing(tiny, batch):
    gradients = []
    for checkpointing in (False, True):
        policy = _load(tiny, gradient_checkpointing=checkpointing).train()
        assert policy.hf_model.is_gradient_checkpointing == checkpointing
        _run(policy, batch).logprobs.sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", ["language_model", "all-linear"])
def test_adapters_and_the_value_head_are_all_that_lora_trains(tiny, batch, target):
    policy = _load(tiny, lora=LoraSettings(rank=2, alpha=4, dropout=0.0, target=target))
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert all(parameter.requires_grad for parameter in policy.value_head.parameters())
    assert not any("lm_head" in name for name in trained)
    decoder_linears = 7 * len(policy.hf_model.model.text_model.layers)
    adapted = {name.split(".lora_")[0] for name in trained if "lora_" in name}
    assert len([name for name in adapted if "text_model.layers" in name]) == decoder_linears
    assert (len(adapted) > decoder_linears) == (target == "all-linear")
    with torch.no_grad():
        torch.testing.assert_close(_run(policy, batch).logprobs, _run(_load(tiny), batch).logprobs, atol=1e-6, rtol=0)


def test_bfloat16_answers_in_float32_near_the_float32_model(tiny, batch):
    with torch.no_grad():
        exact, rough = _run(_load(tiny), batch), _run(_load(tiny, dtype=torch.bfloat16), batch)
    assert rough.logprobs.dtype == rough.entropy.dtype == rough.values.dtype == torch.float32
    assert {p.dtype for p in _load(tiny, dtype=torch.bfloat16).value_head.parameters()} == {torch.float32}
    assert 0 < (exact.logprobs - rough.logprobs).abs().max() < 0.05


def test_a_path_that_holds_no_vlm_is_named(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(NotAVisionLanguageModel, match=str(tmp_path)):
        load_policy(
            str(tmp_path),
            dtype=torch.float32,
            lora=None,
            value_hidden=(8,),
            gradient_checkpointing=False,
            value_gradient=True,
            seed=0,
        )


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_attention_is_what_the_settings_say(tiny, batch, attention):
    policy = _load(tiny, attention=attention)
    used = {module.config._attn_implementation for module in policy.modules() if hasattr(module, "q_proj")}
    assert used == {"sdpa" if attention == "auto" else attention}
    with torch.no_grad():
        torch.testing.assert_close(_run(policy, batch).logprobs, _run(_load(tiny), batch).logprobs, atol=1e-5, rtol=0)


def test_an_attention_that_is_not_installed_names_those_that_are(tiny):
    with pytest.raises(UnsupportedAttention, match=r"flash_attention_2 .* idefics3 in bfloat16.* one of eager, sdpa\."):
        _load(tiny, attention="flash_attention_2", dtype=torch.bfloat16)


def test_flash_attention_is_to_be_had_where_package_family_and_precision_allow_it(monkeypatch):
    from transformers import Idefics3Config, Kosmos2Config

    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert attention_choices(Idefics3Config(), torch.bfloat16) == ["eager", "sdpa", "flash_attention_2"]
    for config, dtype in ((Idefics3Config(), torch.float32), (Kosmos2Config(), torch.bfloat16)):
        assert attention_choices(config, dtype) == ["eager", "sdpa"]
