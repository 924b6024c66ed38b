"""A frozen vision tower is run once per picture, and the policy says what it says without that."""

import copy

import pytest
import torch
from torch import nn

from learner.policy.batch import BatchBuilder
from learner.policy.frozen_tower import keep_features
from learner.policy.model import build_policy
from learner.settings import LoraSettings
from tests.tiny_models import FAMILIES, PROMPT, TEXTS, picture
from tests.tiny_steps import steps

LORA = LoraSettings(rank=4, alpha=8.0, dropout=0.0)
#: Which pictures the micro-batches of an update show: an evaluation of all, then two epochs.
PASSES = [[0, 1, 2, 3], [2], [2, 2], [3, 0], [1, 1, 0], [1, 2, 3]]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def _policy(tiny, lora=LORA, capacity=1 << 24):
    options = {"value_hidden": (8,), "gradient_checkpointing": False, "value_gradient": True, "seed": 1}
    policy = build_policy(copy.deepcopy(tiny.model), lora=lora, **options).eval()
    keep_features(policy.hf_model.base_model, capacity)
    return policy


def _rows_run(policy):
    """Rows that the tower's layers have been given, by pass."""
    tower, runs = policy.hf_model.base_model.get_encoder(modality="image"), []
    layers = next(module for module in tower.modules() if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear))
    layers.register_forward_hook(lambda _module, inputs, _output: runs.append(len(inputs[0])))
    return runs


def _says(policy, tiny, shown):
    sizes = [(64, 64), (40, 90), (64, 64), (90, 40)]
    pictures = [picture(number, *sizes[number]) for number in shown]
    answers = [tiny.chat.tokenizer(TEXTS[number % len(TEXTS)])["input_ids"] for number in shown]
    batch = BatchBuilder(tiny.chat).build(steps(tiny.chat, [PROMPT] * len(shown), pictures, answers), range(len(shown)))
    output = policy(batch, temperature=1.0, banned_token_ids=tiny.chat.banned_token_ids, token_chunk=1000)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(output.logprobs.sum(), parameters, allow_unused=True)
    return output.logprobs, [gradient for gradient in gradients if gradient is not None]


def test_each_picture_is_encoded_once_however_the_passes_are_cut(tiny):
    policy, plain = _policy(tiny), _policy(tiny, capacity=0)
    runs, plain_runs = _rows_run(policy), _rows_run(plain)
    for shown in PASSES:
        found, gradients = _says(policy, tiny, shown)
        expected, plain_gradients = _says(plain, tiny, shown)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(gradients, plain_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert len(runs) == 1 and len(plain_runs) == len(PASSES)


def test_passes_of_one_picture_each_are_kept_too(tiny):
    policy = _policy(tiny)
    runs = _rows_run(policy)
    first = [_says(policy, tiny, [number])[0] for number in (0, 1)]
    again = [_says(policy, tiny, [number])[0] for number in (1, 0)]
    assert len(runs) == 2
    for ours, theirs in zip(first, reversed(again), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lora", [None, LORA.model_copy(update={"target": "all-linear"})])
def test_a_tower_that_is_trained_is_run_in_every_pass(tiny, lora):
    policy = _policy(tiny, lora)
    runs = _rows_run(policy)
    for _ in range(2):
        _says(policy, tiny, [0, 1])
    assert len(runs) == 2


class Tower(nn.Module):
    """Doubles its pixels, one row per picture; `flat` joins all pictures."""

    def __init__(self, flat=False):
        super().__init__()
        self.flat = flat
        self.runs = []

    def forward(self, pixels, scale=2.0):
        self.runs.append(len(pixels))
        rows = scale * pixels.flatten(1)
        return {"features": rows[None] if self.flat else rows}


class Vlm(nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def get_encoder(self, modality):
        return self.tower


def _tower(capacity=1 << 20, **options):
    vlm = Vlm(Tower(**options)).eval()
    keep_features(vlm, capacity)
    return vlm.tower


PIXELS = torch.randn(6, 3, 4, 4)  # 192 bytes a picture


def test_room_is_bounded():
    tower = _tower(capacity=3 * 192)
    tower(PIXELS)
    tower(PIXELS[3:])
    assert tower.runs == [6]
    assert torch.equal(tower(PIXELS)["features"], 2 * PIXELS.flatten(1))
    assert tower.runs == [6, 3]


def test_one_bit_another_order_and_another_argument_make_another_picture():
    tower, changed = _tower(), PIXELS.clone()
    changed[0, 0, 0, 0] = torch.nextafter(changed[0, 0, 0, 0], torch.tensor(9.0))
    changed[1] = changed[1].flip(-1)
    tower(PIXELS)
    assert torch.equal(tower(changed)["features"], 2 * changed.flatten(1))
    assert torch.equal(tower(PIXELS, scale=3.0)["features"], 3 * PIXELS.flatten(1))
    assert tower.runs == [6, 2, 6]


def test_with_dropout_on_every_pass_is_run():
    tower = _tower().train()
    for _ in range(2):
        tower(PIXELS)
    assert tower.runs == [6, 6]


@pytest.mark.parametrize("cuts", [[[0, 1, 2], [0, 1]], [[0], [1], [0, 1]], [[0, 0], [1, 1], [0, 1]]])
def test_a_tower_that_joins_its_pictures_is_run_whole(cuts):
    tower = _tower(flat=True)
    for shown in cuts:
        assert torch.equal(tower(PIXELS[shown])["features"], 2 * PIXELS[shown].flatten(1)[None])
