"""On languages whose causal tokens are known, these have the largest influence by a trained SCM."""

import numpy as np
import pytest

from scoring.effects.estimators import make_estimator
from scoring.effects.tokens import token_facts
from scoring.fidelity import agreement
from scoring.scm.shape import ScmSizes
from scoring.scm.training import ScmTrainer
from scoring.settings import ScmSettings, ScoringSettings
from tests.scoring.languages import Language


@pytest.mark.parametrize("language", [Language(slots=6, causal=(2,)), Language(slots=5, causal=(0, 3))])
def test_a_trained_scm_ranks_the_true_tokens_first(language):
    tokenizer = language.tokenizer()
    facts = token_facts(tokenizer)
    settings = ScmSettings(
        hidden=32, layers=2, heads=2, feedforward=64, max_tokens=16,
        learning_rate=3e-3, round_utterances=1000, minibatch=50,
    )  # fmt: skip
    trainer = ScmTrainer(settings, ScmSizes(vocab_size=facts.vocab_size, head_sizes=language.head_sizes))
    trainer.train(*language.sample(1000, seed=1), rounds=12)
    held_out, labels = language.sample(60, seed=2)
    report = trainer.train(held_out, labels, rounds=0)
    assert report.metrics["unseen"] >= 55 and report.metrics["unseen_accuracy"] > 0.95

    true = {2 * slot + 1 for slot in language.causal}
    values = {}
    for name in ("scm", "gradient"):
        settings = ScoringSettings(window=1, batch_tokens=512)
        estimator = make_estimator(name, facts, settings, scm=trainer.scm.eval())
        values[name] = [estimator.score(ids, row).values for ids, row in zip(held_out, labels, strict=True)]
    reciprocal_ranks = []
    for value in values["scm"]:
        order = np.argsort(-value, kind="stable").tolist()
        reciprocal_ranks.append(1 / (1 + min(order.index(token) for token in true)))
    assert np.mean(reciprocal_ranks) >= 0.95
    everywhere = [np.ones(len(ids), bool) for ids in held_out]
    marks = [np.isin(np.arange(len(ids)), list(true)).astype(float) for ids in held_out]
    assert agreement(values["scm"], marks, everywhere)["top_overlap"] >= 0.9
    assert agreement(values["gradient"], values["scm"], everywhere)["spearman"] > 0.3
