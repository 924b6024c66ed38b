"""The vision tower is run once per picture: on every family, with the outputs and gradients of the plain model."""

import copy

import pytest
import torch
from torch import nn

from learner.policy.batch import BatchBuilder
from learner.policy.model import build_policy
from learner.policy.repeated_pictures import encode_repeats_once
from tests.tiny_models import FAMILIES, PROMPT, TEXTS, picture
from tests.tiny_steps import steps

#: Which picture each sample shows.
SHOWN = [[0, 1, 0, 2, 1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def _run(tiny, batch, encode):
    policy = build_policy(
        copy.deepcopy(tiny.model),
        lora=None,
        value_hidden=(8,),
        gradient_checkpointing=False,
        value_gradient=True,
        seed=1,
    ).eval()
    if not encode:
        vars(policy.hf_model.base_model.get_encoder(modality="image")).pop("forward", None)
    output = policy(batch, temperature=1.0, banned_token_ids=tiny.chat.banned_token_ids, token_chunk=1000)
    (output.logprobs.sum() + output.entropy.sum()).backward()
    return output, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shown", SHOWN)
def test_outputs_and_gradients_are_those_of_the_plain_model(tiny, shown):
    answers = [tiny.chat.tokenizer(text)["input_ids"] for text in TEXTS[1:]] * 3
    batch = BatchBuilder(tiny.chat).build(
        steps(tiny.chat, [PROMPT] * 6, [picture(number) for number in shown], answers), range(6)
    )
    (ours, our_gradients), (plain, plain_gradients) = (_run(tiny, batch, encode) for encode in (True, False))
    torch.testing.assert_close(ours.logprobs, plain.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.entropy, plain.entropy, atol=1e-5, rtol=1e-5)
    assert our_gradients.keys() == plain_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], atol=1e-4, rtol=1e-4, msg=name)


class Tower(nn.Module):
    """Counts the pictures it is run on."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.runs: list[int] = []
        self.flat = flat

    def forward(self, pixels, mask=None):
        self.runs.append(len(pixels))
        rows = pixels.flatten(2).transpose(1, 2)
        return {"last_hidden_state": rows.reshape(1, -1, rows.shape[-1]) if self.flat else rows}


class Vlm(nn.Module):
    def __init__(self, tower) -> None:
        super().__init__()
        self.vision_tower = tower

    def get_encoder(self, modality):
        return self.vision_tower


def _tower(**options):
    model = Vlm(Tower(**options)).eval()
    encode_repeats_once(model)
    return model.vision_tower


PIXELS = torch.randn(3, 3, 4, 4)[[0, 1, 0, 2, 1]]


def test_each_picture_is_encoded_once():
    tower = _tower()
    assert torch.equal(tower(PIXELS)["last_hidden_state"], Tower()(PIXELS)["last_hidden_state"])
    assert tower.runs == [3]


def test_pictures_that_differ_in_another_input_are_not_the_same():
    tower = _tower()
    mask = torch.ones(5, 4, 4, dtype=torch.bool)
    mask[2, 0] = False
    tower(PIXELS, mask=mask)
    assert tower.runs == [4]


def test_with_dropout_on_each_repeat_is_run():
    tower = _tower().train()
    tower(PIXELS)
    assert tower.runs == [5]


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[[0, 0, 0]]])
def test_a_tower_that_joins_its_pictures_is_run_whole(pixels):
    tower = _tower(flat=True)
    for _ in range(2):
        assert torch.equal(tower(pixels)["last_hidden_state"], Tower(flat=True)(pixels)["last_hidden_state"])
    assert tower.runs[-2:] == [len(pixels)] * 2


def test_a_copy_runs_its_own_weights():
    tower = _tower()
    other = copy.deepcopy(tower)
    other(PIXELS)
    assert (tower.runs, other.runs) == ([], [3])
