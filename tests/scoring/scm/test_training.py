"""The SCM finds the token that decides. Its training resumes exactly, and is measured on new utterances."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from scoring.calibration import read_curve
from scoring.effects.estimators import make_estimator
from scoring.effects.tokens import TokenFacts
from scoring.scm.shape import ScmSizes
from scoring.scm.training import ScmTrainer
from scoring.settings import ScmSettings, ScoringSettings

SETTINGS = ScmSettings(
    hidden=16, layers=1, heads=2, feedforward=32, max_tokens=32,
    learning_rate=3e-3, rounds=2, round_utterances=64, minibatch=16, buffer_utterances=100,
)  # fmt: skip
SIZES = ScmSizes(vocab_size=24, head_sizes=(3, 2))
SEED = 5


def make_trainer(seed: int = SEED) -> ScmTrainer:
    return ScmTrainer(SETTINGS, SIZES, seed=seed)


def make_language(seed: int, count: int):
    """A language with a hidden rule: ids 1, 2, 3 anywhere decide the action, one per utterance; the rest is filler."""
    draw = np.random.default_rng(seed)
    utterances, places, labels = [], [], np.full((count, 2), -1, np.int32)
    for i in range(count):
        ids = draw.integers(4, 24, draw.integers(6, 15)).astype(np.int32)
        place, decider = int(draw.integers(len(ids))), int(draw.integers(1, 4))
        ids[place] = decider
        utterances.append(ids)
        places.append(place)
        labels[i, 0] = decider - 1
    return utterances, labels, places


def assert_equal_states(one: ScmTrainer, other: ScmTrainer) -> None:
    (tensors, facts), (other_tensors, other_facts) = one.state_dict(), other.state_dict()
    assert facts == other_facts and tensors.keys() == other_tensors.keys()
    for name, value in tensors.items():
        assert value.dtype == other_tensors[name].dtype and torch.equal(value, other_tensors[name]), name


def test_after_training_the_token_that_decides_ranks_first():
    settings = ScmSettings(
        hidden=32, layers=2, heads=2, feedforward=64, max_tokens=32,
        learning_rate=3e-3, round_utterances=512, minibatch=32, buffer_utterances=2_000,
    )  # fmt: skip
    trainer = ScmTrainer(settings, SIZES, seed=0)
    utterances, labels, _ = make_language(0, 1_000)
    trainer.train(utterances, labels, rounds=10)
    fresh, fresh_labels, places = make_language(1, 100)
    fresh[0] = utterances[0]  # the only one that is not new
    fresh_labels[0] = labels[0]
    report = trainer.train(fresh, fresh_labels, rounds=0)
    assert report.metrics["accuracy"] > 0.95 and report.metrics["ece"] < 0.1
    assert report.metrics["unseen"] == 99 and report.metrics["unseen_accuracy"] > 0.95
    places[0] = int(np.flatnonzero((fresh[0] >= 1) & (fresh[0] <= 3))[0])
    tokens = TokenFacts(vocab_size=24, countable_by_id=np.ones(24, bool), null_id=0)
    scm = trainer.scm.double().eval()
    estimator = make_estimator("scm", tokens, ScoringSettings(window=1, batch_tokens=1024), scm=scm)
    values = [estimator.score(ids, row).values for ids, row in zip(fresh, fresh_labels, strict=True)]
    ranks = [1 + int((value > value[place]).sum()) for value, place in zip(values, places, strict=True)]
    assert np.mean([1 / rank for rank in ranks]) >= 0.95


def test_repeated_utterances_count_as_often_as_they_occur():
    """Training computes distinct utterances once; it equals training that computes every one."""
    utterances, labels, _ = make_language(3, 8)
    chosen = np.random.default_rng(0).integers(0, 8, 90)
    labels[chosen[0], 1] = 1  # the same tokens with another action are another pair
    utterances, labels = [utterances[i] for i in chosen], labels[chosen]
    labels[1:, 1] = -1
    trainer, plain = make_trainer(), make_trainer()
    # The gradient of the keys' bias is 0 but for rounding, and Adam makes full steps of that rounding in float32. In
    # float64 it is too small.
    trainer.scm.double(), plain.scm.double()
    report = trainer.train(utterances, labels)

    scm, order = plain.scm, torch.Generator().manual_seed(SEED)
    optimiser = torch.optim.Adam(scm.parameters(), lr=SETTINGS.learning_rate)

    def loss_of(row: int) -> torch.Tensor:
        logits = scm(torch.from_numpy(utterances[row])[None].long(), torch.tensor([len(utterances[row])]))
        # A head that does not apply gets gradients of 0, not None: Adam treats these differently.
        pairs = zip(logits, labels[row], strict=True)
        return sum(-each.log_softmax(-1)[0, label] if label >= 0 else each.sum() * 0.0 for each, label in pairs)

    before = [loss_of(row).item() for row in range(90)]
    assert report.metrics["new_loss"] == pytest.approx(np.mean(before), rel=1e-5)
    for _ in range(SETTINGS.rounds):
        rows = torch.randperm(90, generator=order)[: SETTINGS.round_utterances]
        for minibatch in rows.split(SETTINGS.minibatch):
            optimiser.zero_grad()
            torch.stack([loss_of(row) for row in minibatch.tolist()]).mean().backward()
            optimiser.step()
    for name, value in scm.state_dict().items():
        torch.testing.assert_close(trainer.scm.state_dict()[name], value, rtol=1e-6, atol=1e-8)


def test_a_saved_and_loaded_trainer_continues_exactly():
    straight, stopped = make_trainer(), make_trainer()
    for trainer in (straight, stopped):
        for seed in (1, 2):
            trainer.train(*make_language(seed, 70)[:2])
    tensors, facts = stopped.state_dict()
    resumed = make_trainer(seed=9)
    resumed.load_state_dict(load(save(tensors)), json.loads(json.dumps(facts)))
    reports = [trainer.train(*make_language(3, 70)[:2]) for trainer in (straight, resumed)]
    assert reports[0] == reports[1] and reports[0].metrics["version"] == 3
    assert_equal_states(straight, resumed)


def test_a_trainer_that_has_not_trained_can_be_saved():
    fresh, loaded = make_trainer(), make_trainer()
    loaded.train(*make_language(1, 20)[:2])
    tensors, facts = fresh.state_dict()
    loaded.load_state_dict(load(save(tensors)), facts)
    assert_equal_states(fresh, loaded)
    assert fresh.train(*make_language(1, 20)[:2]) == loaded.train(*make_language(1, 20)[:2])


def test_new_utterances_are_measured_before_they_are_trained_on():
    utterances, labels, _ = make_language(0, 40)
    still, trained = make_trainer(), make_trainer()
    before, after = still.train(utterances, labels, rounds=0), trained.train(utterances, labels, rounds=8)
    for name in ("new_loss", "accuracy", "confidence", "ece"):
        assert before.metrics[name] == after.metrics[name]
    assert "loss" not in before.metrics and before.metrics["steps"] == 0
    assert after.metrics["steps"] == 8 * 3 and after.metrics["loss"] < after.metrics["new_loss"]
    curve = read_curve(after.metrics, "")
    assert curve is not None and curve.count.sum() == 40 and curve.error == after.metrics["ece"]
    # The measured loss is the cross-entropy of the one head that applies.
    scm = make_trainer().scm.eval()
    with torch.no_grad():
        logs = [
            scm.log_probabilities(torch.tensor(ids[None].astype(np.int64)), torch.tensor([len(ids)]))[0][0, row[0]]
            for ids, row in zip(utterances, labels, strict=True)
        ]
    assert before.metrics["new_loss"] == pytest.approx(-float(torch.stack(logs).mean()), abs=1e-5)


def test_utterances_that_did_not_parse_are_left_out_and_the_buffer_keeps_the_latest():
    trainer = make_trainer()
    utterances, labels, _ = make_language(0, 120)
    labels[:10] = -1
    utterances[10] = np.empty(0, np.int32)
    report = trainer.train(utterances, labels)
    assert report.metrics["new"] == 109 and report.metrics["buffer"] == 100
    kept = trainer.state_dict()[0]["buffer.labels"].numpy()
    np.testing.assert_array_equal(kept, labels[-100:])


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_of_a_single_utterance_is_measured(count: int):
    """An array indexed by a tensor of one element would be a number, not an array of one."""
    settings = SETTINGS.model_copy(update={"temperature_scaling": True})
    utterances, labels, _ = make_language(4, 1)
    report = ScmTrainer(settings, SIZES, seed=SEED).train(utterances * count, np.repeat(labels, count, axis=0))
    assert report.metrics["unseen"] == count
    curve = read_curve(report.metrics, "")
    assert curve is not None and curve.count.sum() == count


def test_nothing_to_learn_from_is_no_error():
    report = make_trainer().train([], np.empty((0, 2), np.int32))
    assert report.metrics == {"version": 1, "buffer": 0, "new": 0, "steps": 0}


def test_the_state_of_an_scm_of_another_shape_is_refused():
    tensors, facts = make_trainer().state_dict()
    other = ScmTrainer(SETTINGS, ScmSizes(vocab_size=30, head_sizes=(3, 2)))
    with pytest.raises(ValueError, match="vocab_size = 24, this run has 30"):
        other.load_state_dict(tensors, facts)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    make_trainer().train(*make_language(0, 20)[:2])
    assert torch.equal(torch.rand(4), expected)
