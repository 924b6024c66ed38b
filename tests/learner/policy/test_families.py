"""The learner's forward pass on tiny random models of four families, against each family's own plain forward."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from learner.policy.batch import BatchBuilder
from learner.policy.model import PolicyOutput, adapted_layers, build_policy
from learner.policy.shared_prompts import shares_prompts
from learner.policy.weight_export import layers_on_disk
from learner.settings import LoraSettings
from tests.tiny_models import FAMILIES, PROMPT, TEXTS, picture
from tests.tiny_steps import steps

TEMPERATURE = 0.7


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def _build(vlm, lora=None):
    return build_policy(vlm, lora=lora, value_hidden=(16,), gradient_checkpointing=False, value_gradient=True, seed=3)


@pytest.fixture(scope="module")
def policy(tiny):
    return _build(tiny.model).eval()


def _steps(tiny):
    """Prompts, pictures and responses of different sizes, so that everything that can be padded is."""
    pictures = [picture(1, 64, 64), picture(2, 40, 90), picture(3, 90, 40)]
    responses = [tiny.chat.tokenizer(text)["input_ids"] + tiny.chat.eos_token_ids for text in TEXTS]
    return [PROMPT, "Answer.", PROMPT + " Be brief."], pictures, responses


def _run(policy, tiny, batch):
    return policy(batch, temperature=TEMPERATURE, banned_token_ids=tiny.chat.banned_token_ids, token_chunk=7)


@torch.no_grad()
def _plain(tiny, prompt, image, response):
    """Log-probabilities and entropies of one response, from the family's own logits without any padding."""
    inputs = tiny.chat.encode_prompt(prompt, Image.fromarray(image))
    answer = torch.tensor([response])
    length = inputs["input_ids"].shape[1]
    for name, value in inputs.items():
        if value.shape == (1, length) and name not in ("input_ids", "attention_mask"):
            inputs[name] = torch.cat([value, torch.zeros_like(answer)], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = tiny.model.eval()(**inputs).logits[0, length - 1 : -1].double() / TEMPERATURE
    logits[:, tiny.chat.banned_token_ids] = -torch.inf
    logprobs = logits.log_softmax(-1)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    return logprobs[torch.arange(len(response)), response], entropy


def test_logprobs_and_entropies_equal_the_familys_own_logits(tiny, policy):
    prompts, pictures, responses = _steps(tiny)
    batch = BatchBuilder(tiny.chat).build(steps(tiny.chat, prompts, pictures, responses), [0, 1, 2])
    with torch.no_grad():
        output = _run(policy, tiny, batch)
    for row, example in enumerate(zip(prompts, pictures, responses, strict=True)):
        logprobs, entropy = _plain(tiny, *example)
        length = len(example[2])
        torch.testing.assert_close(output.logprobs[row, :length].double(), logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.entropy[row, :length].double(), entropy, atol=1e-5, rtol=0)
        assert not output.logprobs[row, length:].any() and not output.entropy[row, length:].any()


def test_a_step_does_not_depend_on_its_batch(tiny, policy):
    trajectories = steps(tiny.chat, *_steps(tiny))
    builder = BatchBuilder(tiny.chat)
    torch.nn.init.normal_(policy.value_head.mlp[-1].weight)
    with torch.no_grad():
        together = _run(policy, tiny, builder.build(trajectories, [2, 0, 1]))
        for row, index in enumerate([2, 0, 1]):
            alone = _run(policy, tiny, builder.build(trajectories, [index]))
            length = alone.logprobs.shape[1]
            torch.testing.assert_close(together.logprobs[row, :length], alone.logprobs[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(together.entropy[row, :length], alone.entropy[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(together.values[row], alone.values[0], atol=1e-5, rtol=0)
    assert together.values.std() > 0


def test_a_prompt_that_is_run_once_for_all_its_answers_changes_no_output_and_no_gradient(tiny, policy):
    prompts, pictures, responses = _steps(tiny)
    # Two prompts that are equal but for the picture, and one of another length; answers of several lengths.
    prompts, pictures = ([values[n] for n in (0, 1, 0, 0, 1, 0, 1)] for values in (prompts, pictures))
    pictures[3] = picture(9, 64, 64)
    answers = [responses[n % 3] for n in range(5)] + [[7], [9]]
    trajectories = steps(tiny.chat, prompts, pictures, answers)
    torch.nn.init.normal_(policy.value_head.mlp[-1].weight)

    def run(share: bool) -> tuple[PolicyOutput, list[torch.Tensor]]:
        batch = BatchBuilder(tiny.chat).build(trajectories, np.arange(7), share_prompts=share)
        assert (batch.prompt_of is not None) == share and len(batch.model_inputs["input_ids"]) == (3 if share else 7)
        policy.zero_grad()
        output = _run(policy, tiny, batch)
        weights = torch.arange(1.0, 8.0)[:, None]
        ((output.logprobs + output.entropy) * weights).sum().backward(retain_graph=True)
        output.values.sum().backward()
        return output, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()]

    if not shares_prompts(tiny.model):
        assert type(tiny.model).__name__.startswith(("Qwen2_5", "Gemma3"))
        return
    (shared, gradients), (plain, expected) = run(True), run(False)
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(shared, name), getattr(plain, name), atol=1e-5, rtol=0)
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-2
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value, atol=1e-4, rtol=1e-3)


def test_answers_of_one_token_share_prompts_too(tiny, policy):
    trajectories = steps(tiny.chat, [PROMPT] * 3, [picture()] * 3, [[7], [8], [7]])
    shared, plain = (
        _run(policy, tiny, BatchBuilder(tiny.chat).build(trajectories, [0, 1, 2], share_prompts=share))
        for share in (shares_prompts(tiny.model), False)
    )
    torch.testing.assert_close(shared.logprobs, plain.logprobs, atol=1e-5, rtol=0)


def test_what_it_publishes_is_what_save_pretrained_writes(tiny, policy, tmp_path):
    from safetensors.torch import load_file

    tiny.model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    published = dict(policy.checkpoint_weights(lambda parameters: nullcontext()))
    assert published.keys() == on_disk.keys()
    for name, tensor in on_disk.items():
        assert torch.equal(published[name], tensor), name


def test_published_adapters_reload_as_the_adapted_model(tiny, tmp_path):
    from safetensors.torch import save_file

    plain = type(tiny.model)(tiny.model.config).eval()
    policy = _build(plain, LoraSettings(rank=2, alpha=8, dropout=0.0)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    batch = BatchBuilder(tiny.chat).build(steps(tiny.chat, *_steps(tiny)), [0, 1, 2])
    with torch.no_grad():
        adapted = _run(policy, tiny, batch)
        with policy.vlm.disable_adapter():
            bare = _run(policy, tiny, batch)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    published = dict(policy.checkpoint_weights(lambda parameters: nullcontext()))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())

    tiny.model.config.save_pretrained(tmp_path)
    save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reloaded, report = type(tiny.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        merged = _run(_build(reloaded).eval(), tiny, batch)
    torch.testing.assert_close(merged.logprobs, adapted.logprobs, atol=1e-5, rtol=0)
    assert (bare.logprobs - adapted.logprobs).abs().max() > 1e-2


@pytest.mark.parametrize("target", ["language_model", "all-linear"])
def test_adapters_go_by_the_names_that_checkpoints_give_their_layers(tiny, policy, target):
    plain = type(tiny.model)(tiny.model.config)
    adapted = _build(plain.bfloat16(), LoraSettings(rank=2, alpha=8, target=target))
    weights = dict(policy.checkpoint_weights(lambda parameters: nullcontext()))
    adapters = dict(adapted.adapter_weights(lambda parameters: nullcontext()))
    layers = {name.rpartition(".lora_")[0] for name in adapters}
    for layer in layers:
        up, low = adapters[f"{layer}.lora_B.weight"], adapters[f"{layer}.lora_A.weight"]
        assert (up @ low).shape == weights[f"{layer}.weight"].shape and up.dtype == low.dtype == torch.bfloat16
        assert not up.any() and low.any()
    with torch.device("meta"):
        unmade = type(tiny.model)(tiny.model.config)
    assert set(layers_on_disk(unmade, adapted_layers(unmade, target)).values()) == layers


def test_every_part_of_the_model_is_trained(tiny, policy):
    policy.zero_grad()
    batch = BatchBuilder(tiny.chat).build(steps(tiny.chat, *_steps(tiny)), [0, 1])
    output = _run(policy.train(), tiny, batch)
    (output.logprobs.sum() + output.entropy.sum()).backward()
    policy.eval()
    tower = next(p for name, p in policy.named_parameters() if ("vision" in name or "visual" in name) and p.ndim > 1)
    assert tower.grad is not None and tower.grad.abs().max() > 0
    assert np.isfinite([float(p.grad.abs().max()) for p in policy.parameters() if p.grad is not None]).all()
