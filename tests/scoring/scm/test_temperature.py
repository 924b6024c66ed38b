"""Temperature scaling: the best temperature by brute force, fitted on answers that are never trained on, and applied to
every probability that influence uses."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from scoring.calibration import of_probabilities
from scoring.effects.estimators import make_estimator
from scoring.effects.tokens import TokenFacts
from scoring.scm.encoder import PRECISIONS, in_precision
from scoring.scm.model import StructuralCausalModel
from scoring.scm.temperature import FEWEST_HELD_OUT, HIGHEST, LOWEST, fit_temperature, is_held_out
from scoring.scm.training import ScmTrainer
from scoring.settings import ScmSettings, ScoringSettings
from tests.scoring.scm.test_training import SETTINGS, SIZES, make_language

SCALING = SETTINGS.model_copy(update={"temperature_scaling": True, "buffer_utterances": 1_000})
TOKENS = TokenFacts(vocab_size=24, countable_by_id=np.ones(24, bool), null_id=0)


@given(seed=st.integers(0, 999), count=st.integers(1, 40), sharpness=st.sampled_from([0.1, 1.0, 5.0, 30.0]))
@settings(max_examples=60, deadline=None)
def test_the_temperature_has_the_smallest_cross_entropy_of_a_fine_grid(seed, count, sharpness):
    generator = torch.Generator().manual_seed(seed)
    logits = [sharpness * torch.randn(count, size, generator=generator) for size in (3, 5)]
    labels = torch.stack([torch.randint(-1, size, (count,), generator=generator) for size in (3, 5)], dim=1)
    labels[:, 0].clamp_(min=0)  # an answer that parsed has at least one label

    def loss(temperature):
        terms = [
            functional.cross_entropy(each.double() / temperature, labels[:, head], ignore_index=-1, reduction="sum")
            for head, each in enumerate(logits)
            if (labels[:, head] >= 0).any()
        ]
        return float(sum(terms))

    found = fit_temperature(logits, labels)
    best = min(loss(temperature) for temperature in np.geomspace(LOWEST, HIGHEST, 400))
    assert LOWEST - 1e-9 <= found <= HIGHEST + 1e-9 and loss(found) <= best + 1e-6 * max(1.0, abs(best))


def test_an_scm_that_is_right_everywhere_gets_the_lowest_temperature_and_a_wrong_one_the_highest():
    logits, labels = [torch.eye(3)], torch.arange(3)[:, None]
    assert fit_temperature(logits, labels) == pytest.approx(LOWEST)
    assert fit_temperature([-logits[0]], labels) == pytest.approx(HIGHEST)


def test_scaling_makes_an_overconfident_predictor_calibrated():
    """Logits four times those that the labels were drawn from: the temperature is 4."""
    generator = torch.Generator().manual_seed(1)
    true = torch.randn(4_000, 5, generator=generator)
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator)
    temperature = fit_temperature([4 * true], labels)
    assert temperature == pytest.approx(4.0, rel=0.08)

    def error(logits):
        confidence, predicted = logits.softmax(-1).max(-1)
        return of_probabilities(confidence.clamp(max=1), predicted == labels[:, 0]).error

    assert error(4 * true) > 0.2 and error(4 * true / temperature) < 0.03


def held_out_and_trained(count=400):
    utterances, labels, _ = make_language(0, count)
    held_out = np.array([is_held_out(ids) for ids in utterances])
    return utterances, labels, held_out


def test_held_out_answers_never_train_the_scm(monkeypatch):
    utterances, labels, held_out = held_out_and_trained()
    assert FEWEST_HELD_OUT <= held_out.sum() < 80
    seen: set[bytes] = set()
    trainer = ScmTrainer(SCALING, SIZES)

    def spy(ids, lengths, forward=trainer.scm.forward):
        if torch.is_grad_enabled():
            seen.update(row[:n].astype(np.int32).tobytes() for row, n in zip(ids.numpy(), lengths, strict=True))
        return forward(ids, lengths)

    monkeypatch.setattr(trainer.scm, "forward", spy)
    report = trainer.train(utterances, labels, rounds=30)
    assert seen == {ids.tobytes() for ids, out in zip(utterances, held_out, strict=True) if not out}
    assert report.metrics["held_out"] == min(held_out.sum(), SCALING.round_utterances)


def test_the_temperature_is_of_the_held_out_answers_and_only_in_the_weights_that_scorers_get():
    utterances, labels, held_out = held_out_and_trained()
    trainer = ScmTrainer(SCALING, SIZES)
    report = trainer.train(utterances, labels, rounds=20)
    chosen = np.flatnonzero(held_out)[-SCALING.round_utterances :]
    with torch.no_grad():
        logits = [trainer.scm(torch.tensor(utterances[i][None].astype(int)), torch.tensor([len(utterances[i])]))
                  for i in chosen]  # fmt: skip
    by_head = [torch.cat([each[head] for each in logits]) for head in (0, 1)]
    expected = fit_temperature(by_head, torch.from_numpy(labels[chosen].astype(np.int64)))
    assert report.metrics["temperature"] == pytest.approx(expected, rel=1e-4) and abs(expected - 1) > 0.01
    assert float(trainer.scm.temperature) == 1.0  # training goes on with unscaled logits
    assert float(trainer.weights()["temperature"]) == trainer.temperature == report.metrics["temperature"]


def test_new_answers_are_measured_with_the_probabilities_that_are_used():
    utterances, labels, _ = held_out_and_trained()
    trainer = ScmTrainer(SCALING, SIZES)
    trainer.train(utterances, labels, rounds=20)
    used = StructuralCausalModel(SCALING, SIZES)
    used.load_state_dict(trainer.weights())
    fresh, fresh_labels, _ = make_language(7, 60)
    confidence, right = [], []
    with torch.no_grad():
        for ids, row in zip(fresh, fresh_labels, strict=True):
            probability, predicted = (
                used(torch.tensor(ids[None].astype(int)), torch.tensor([len(ids)]))[0][0].softmax(-1).max(-1)
            )
            confidence.append(float(probability))
            right.append(int(predicted) == row[0])
    metrics = trainer.train(fresh, fresh_labels).metrics
    assert metrics["ece"] == pytest.approx(of_probabilities(confidence, right).error, abs=1e-5)
    assert metrics["confidence"] == pytest.approx(np.mean(confidence), abs=1e-5)
    assert metrics["unscaled_ece"] != pytest.approx(metrics["ece"], abs=1e-3)


def test_with_too_few_held_out_answers_the_temperature_stays():
    utterances, labels, _ = make_language(0, 40)
    report = ScmTrainer(SCALING, SIZES).train(utterances, labels)
    assert report.metrics["temperature"] == 1.0 and report.metrics["held_out"] < FEWEST_HELD_OUT
    only = next(ids for ids in make_language(0, 100)[0] if is_held_out(ids))
    report = ScmTrainer(SCALING, SIZES).train([only] * 30, np.tile(np.array([[1, -1]], np.int32), (30, 1)))
    assert report.metrics["steps"] > 0 and report.metrics["temperature"] == 1.0  # nothing else to learn from


@pytest.mark.parametrize("estimator", ["scm", "gradient"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_influence_is_that_of_an_scm_whose_heads_are_divided(estimator, precision):
    torch.manual_seed(0)
    scm = StructuralCausalModel(SETTINGS, SIZES)
    scm.temperature.fill_(2.7)
    divided = copy.deepcopy(scm)
    divided.temperature.fill_(1.0)
    scm, divided = in_precision(scm, precision), in_precision(divided, precision)
    for output in divided.outputs:
        output.weight.data /= 2.7
        output.bias.data /= 2.7
    scoring = ScoringSettings(window=1)
    found, expected = (make_estimator(estimator, TOKENS, scoring, scm=each) for each in (scm, divided))
    utterances, labels, _ = make_language(2, 10)
    for ids, row in zip(utterances, labels, strict=True):
        np.testing.assert_allclose(found.score(ids, row).values, expected.score(ids, row).values, atol=1e-6)


def test_a_saved_trainer_continues_with_its_temperature_and_an_old_one_has_none():
    straight, stopped, resumed = (ScmTrainer(SCALING, SIZES) for _ in range(3))
    for trainer in (straight, stopped):
        trainer.train(*make_language(0, 400)[:2])
    tensors, facts = stopped.state_dict()
    resumed.load_state_dict(tensors, facts)
    assert resumed.temperature == stopped.temperature != 1
    assert straight.train(*make_language(1, 50)[:2]) == resumed.train(*make_language(1, 50)[:2])

    old = {name: value for name, value in tensors.items() if name != "scm.temperature"}  # as saved before scaling
    resumed.load_state_dict(old, facts)
    assert resumed.temperature == 1.0
    off = ScmTrainer(ScmSettings(**SCALING.model_dump() | {"temperature_scaling": False}), SIZES)
    off.load_state_dict(tensors, facts)
    assert off.temperature == float(off.weights()["temperature"]) == 1.0
