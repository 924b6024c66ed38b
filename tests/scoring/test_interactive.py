"""One call computes influence from texts or ids, with any estimator; a run's SCM is loaded from its checkpoint."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import scoring
from scoring.scm.shape import ScmSizes
from scoring.scm.training import ScmTrainer
from scoring.settings import ScmSettings
from tests.scoring.languages import Language

LANGUAGE = Language(slots=4, causal=(1,))
TOKENIZER = LANGUAGE.tokenizer()
SIZES = ScmSizes(vocab_size=len(TOKENIZER), head_sizes=(6,))
SETTINGS = ScmSettings(
    hidden=16, layers=1, heads=2, feedforward=32, learning_rate=1e-2, round_utterances=100, minibatch=20
)
PARSER = scoring.ScoringSettings(estimator="parser", window=1)
UNIFORM = scoring.ScoringSettings(estimator="uniform")


def test_texts_ids_labels_and_parsed_actions_are_all_accepted():
    ids, labels = LANGUAGE.sample(5, seed=0)
    texts = [TOKENIZER.decode(row) for row in ids]
    values = scoring.influence(ids, labels, PARSER, tokenizer=TOKENIZER, parser=LANGUAGE)
    assert [np.flatnonzero(value).tolist() for value in values] == [[2, 3]] * 5
    actions = [LANGUAGE.parse(text) for text in texts]
    again = scoring.influence(texts, actions, PARSER, tokenizer=TOKENIZER, parser=LANGUAGE)
    np.testing.assert_array_equal(again, values)


def test_a_checkpointed_scm_scores_as_it_did(tmp_path):
    trainer = ScmTrainer(SETTINGS, SIZES)
    ids, labels = LANGUAGE.sample(100, seed=1)
    trainer.train(ids, labels, rounds=2)
    tensors, facts = trainer.state_dict()
    save_file(tensors, tmp_path / "scm.safetensors")
    (tmp_path / "scm.json").write_text(json.dumps(facts))
    scm = scoring.load_scm(tmp_path)
    assert scm.token_embedding.weight.dtype == torch.float64 and not scm.training
    settings = scoring.ScoringSettings(window=2)
    expected = scoring.influence(ids[:4], labels[:4], settings, tokenizer=TOKENIZER, scm=trainer.scm.double())
    found = scoring.influence(ids[:4], labels[:4], settings, tokenizer=TOKENIZER, scm=scm)
    np.testing.assert_array_equal(found, expected)
    assert max(value.max() for value in found) > 0.9
    settings = scoring.ScoringSettings(window=2, null_token="v5")
    other_null = scoring.influence(ids[:4], labels[:4], settings, tokenizer=TOKENIZER, scm=scm)
    assert not np.array_equal(other_null, found)


def test_input_that_does_not_fit_is_an_error_that_says_why():
    ids, labels = LANGUAGE.sample(2, seed=0)
    with pytest.raises(ValueError, match="'scm' needs a structural causal model"):
        scoring.influence(ids, labels, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="one row of labels per utterance: 2 utterances"):
        scoring.influence(ids, labels[:1], UNIFORM, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="token ids from .* to 99"):
        scoring.influence([np.array([1, 99])], labels[:1], UNIFORM, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="label 6 for head 0"):
        scoring.influence(ids, labels * 0 + 6, tokenizer=TOKENIZER, scm=ScmTrainer(SETTINGS, SIZES).scm)
    with pytest.raises(ValueError, match="null_token 'v9' is not in"):
        settings = UNIFORM.model_copy(update={"null_token": "v9"})
        scoring.influence(ids, labels, settings, tokenizer=TOKENIZER)
    with pytest.raises(AttributeError, match="no attribute 'oracle'"):
        scoring.oracle  # noqa: B018


def test_nothing_to_score_is_no_error():
    empty = np.empty((0, 1), np.int32)
    assert scoring.influence([], empty, UNIFORM, tokenizer=TOKENIZER) == []
