"""A checkpoint that older code wrote still loads, and training continues; another shape is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import scoring
from scoring.scm.shape import ScmSizes, check_shape, read_shape, saved_shape
from scoring.scm.training import ScmTrainer
from scoring.settings import ScmSettings

#: Written by commit 59d6b59, where one dataclass held an SCM's sizes and settings, after two calls of `train`.
OLD = Path(__file__).parent / "old_checkpoint"
SETTINGS = ScmSettings(
    hidden=8, layers=1, heads=2, feedforward=8, max_tokens=6,
    learning_rate=1e-2, rounds=2, round_utterances=16, minibatch=8, buffer_utterances=30,
)  # fmt: skip
SIZES = ScmSizes(vocab_size=12, head_sizes=(3, 2))


def test_an_old_checkpoint_scores_as_it_did():
    scm = scoring.load_scm(OLD)
    ids, lengths, labels = torch.tensor([[1, 2, 3, 4]]), torch.tensor([4]), torch.tensor([[1, 0]])
    assert scm.action_probability(ids, lengths, labels).item() == pytest.approx(0.1102, abs=5e-5)


def test_training_continues_from_an_old_checkpoint_as_with_the_old_code():
    trainer = ScmTrainer(SETTINGS, SIZES)
    trainer.load_state_dict(load_file(OLD / "scm.safetensors"), json.loads((OLD / "scm.json").read_text()))
    draw = np.random.default_rng(2)
    utterances = [draw.integers(0, 12, draw.integers(1, 9)).astype(np.int32) for _ in range(20)]
    labels = np.array([[ids[0] % 3, ids[-1] % 2] for ids in utterances], np.int32)
    metrics = trainer.train(utterances, labels).metrics
    assert (metrics["version"], metrics["buffer"], metrics["unseen"]) == (3, 30, 19)
    assert metrics["new_loss"] == pytest.approx(1.78357, rel=1e-4)
    assert metrics["loss"] == pytest.approx(1.68995, rel=1e-4)  # the old optimiser state, buffer and random state


def test_what_is_saved_is_what_older_code_saved_and_reads_back():
    facts = json.loads((OLD / "scm.json").read_text())
    assert saved_shape(SETTINGS, SIZES) == facts["settings"]
    encoder, sizes = read_shape(facts["settings"])
    assert sizes == SIZES and saved_shape(encoder, sizes) == facts["settings"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 13}, "the saved SCM has vocab_size = 13, this run has 12"),
        ({"head_sizes": [3]}, r"the saved SCM has head_sizes = \[3\], this run has \[3, 2\]"),
        ({"dropout": 0.1}, "another version of the code, which differs in dropout"),
        ({"hidden": None}, "another version of the code, which differs in hidden"),
    ],
)
def test_an_scm_of_another_shape_is_refused_in_one_line(change, message):
    saved = {name: value for name, value in (saved_shape(SETTINGS, SIZES) | change).items() if value is not None}
    with pytest.raises(ValueError, match=message) as error:
        check_shape(saved, SETTINGS, SIZES)
    assert len(str(error.value).splitlines()) == 1
