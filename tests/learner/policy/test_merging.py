"""How much of a small update of adapters is left of it where it is served, and the learner with merged adapters."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file

from learner.policy.batch import BatchBuilder
from learner.policy.model import load_policy
from learner.policy.weight_export import merged_weight
from learner.settings import LoraSettings
from tests.tiny_models import PROMPT, TEXTS, make_idefics3, picture
from tests.tiny_steps import steps


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_idefics3(tmp_path_factory.mktemp("idefics3"))


def _load(folder, dtype, **lora):
    settings = LoraSettings(rank=4, alpha=6.0, dropout=0.0, **lora) if lora else None
    policy = load_policy(
        folder,
        dtype=dtype,
        lora=settings,
        value_hidden=(4,),
        gradient_checkpointing=False,
        value_gradient=True,
        seed=1,
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(dtype)
    return policy.eval()


def _logprobs(policy, tiny):
    responses = [tiny.chat.tokenizer(text)["input_ids"] for text in TEXTS]
    trajectories = steps(tiny.chat, [PROMPT] * 3, [picture(number) for number in range(3)], responses)
    batch = BatchBuilder(tiny.chat).build(trajectories, [0, 1, 2])
    return policy(batch, temperature=1.0, banned_token_ids=[0], token_chunk=64).logprobs


def test_in_bfloat16_the_learner_computes_with_the_merged_weights_that_it_publishes(tiny, tmp_path):
    merged = _load(tiny.chat.path, torch.bfloat16, serving="merged", target="all-linear")
    tiny.model.config.save_pretrained(tmp_path)
    published = dict(merged.checkpoint_weights(lambda parameters: nullcontext()))
    save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = _load(str(tmp_path), torch.bfloat16)
    beside = _load(tiny.chat.path, torch.bfloat16, serving="adapters", target="all-linear")
    with torch.no_grad():
        served = _logprobs(engine, tiny)
        assert torch.equal(_logprobs(merged, tiny), served)
        assert not torch.equal(_logprobs(beside, tiny), served)


def test_merged_adapters_get_the_gradients_of_adapters(tiny):
    gradients = []
    for serving in ("merged", "adapters"):
        policy = _load(tiny.chat.path, torch.bfloat16, serving=serving, target="all-linear").float()
        _logprobs(policy, tiny).sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and all(".lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=name)
