"""The scoring stage trains and scores in the order of its mode, compares scores with the parser, and saves its SCM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.chat import ChatProcessor
from actors.trajectory import TrajectoryBatch
from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.run.scoring_stage import ScoringStage, load_scm, save_scm
from envs.action_parser import action_parser
from scoring.effects.parser_effects import ParserSource
from scoring.effects.tokens import TokenFacts, token_facts
from scoring.pool.scorers import ScoringError
from scoring.pool.scoring_pool import ScoringContext, ScoringPool
from scoring.settings import ScmSettings, ScoringSettings
from tests.cluster.report.test_page import step
from tests.tiny_models import make_idefics3

ANSWERS = [
    f'{{"thoughts": "the target is {n} so I should {word}", "action": "{sign}"}}'
    for n in range(4)
    for word, sign in (("add", "+"), ("subtract", "-"))
]


pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatProcessor:
    return make_idefics3(tmp_path_factory.mktemp("model") / "tiny").chat


@pytest.fixture(scope="module")
def tokens(chat: ChatProcessor) -> TokenFacts:
    return token_facts(chat.tokenizer)


def make_pool(
    chat: ChatProcessor, tokens: TokenFacts, parses: bool = True, estimator: str = "scm", **scm_settings: Any
) -> ScoringPool:
    source = ParserSource(tokenizer=chat.tokenizer, parser=action_parser("coso/NumberLine-v0", {}))
    scm = ScmSettings(
        hidden=16, layers=1, heads=2, feedforward=32, learning_rate=1e-2, rounds=4, round_utterances=64, minibatch=8,
        **scm_settings,
    )  # fmt: skip
    context = ScoringContext(
        tokens=tokens,
        head_sizes=(2,),
        parser=source if parses else None,
        seed=0,
        actor_cpus=0.1,
        max_failures=3,
    )
    pool = ScoringPool(ScoringSettings(window=1, estimator=estimator, scm=scm), context)
    pool.start()
    return pool


def make_batch(chat: ChatProcessor, answers: list[str] | None = None) -> TrajectoryBatch:
    parse = action_parser("coso/NumberLine-v0", {}).parse
    rows = []
    for number, text in enumerate(answers or [*ANSWERS, *ANSWERS, "no action at all"]):
        ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"] + chat.eos_token_ids[:1]
        parsed = parse(text)
        rows.append(
            step(
                str(number),
                0,
                "",
                response_ids=ids,
                utterance=text,
                action=parsed.action,
                action_labels=parsed.labels.tolist(),
                valid=parsed.valid,
            )  # fmt: skip
        )
    return TrajectoryBatch.from_rows(rows, {})


def config_of(**scoring_and_mode) -> RunConfig:
    mode = scoring_and_mode.pop("mode", "sync")
    return validate({"mode": mode, "scoring": scoring_and_mode})


def test_each_mode_trains_and_scores_in_its_own_order(chat: ChatProcessor, tokens: TokenFacts):
    pool = make_pool(chat, tokens)
    try:
        batch = make_batch(chat)
        scored, row = ScoringStage(config_of(mode="async"), pool, chat).score(batch)
        assert row["scm/version"] == row["scoring/version"] == 1  # there was no SCM before
        _, row = ScoringStage(config_of(mode="async"), pool, chat).score(batch)
        assert (row["scoring/version"], row["scm/version"], pool.version) == (1, 2, 2)
        assert row["cache/hit_rate"] == 1  # the batch and the SCM are the same as before
        scored, row = ScoringStage(config_of(mode="sync"), pool, chat).score(batch)
        assert row["scoring/version"] == row["scm/version"] == 3

        influence = scored.ragged("influence", np.float32)
        expected, _ = pool.score(scored.ragged("response_ids", np.int32), np.stack(batch.ragged("action_labels", int)))
        for value, wanted in zip(influence, expected, strict=True):
            np.testing.assert_array_equal(value, wanted)
        assert row["scoring/utterances"] == 17 and row["scoring/distinct"] == 9
        assert row["fidelity/utterances"] == len(ANSWERS)
        assert -1 <= row["fidelity/spearman"] <= 1 and 0 <= row["fidelity/top_overlap"] <= 1
        assert -1 <= row["fidelity/gradient_spearman"] <= 1
        mass = [value[chat.action_start(ids) :].sum() / value.sum()
                for value, ids in zip(influence[:8], batch.ragged("response_ids", int), strict=False)]  # fmt: skip
        assert row["fidelity/action_mass"] == pytest.approx(np.mean(mass), abs=1e-6)

        _, row = ScoringStage(config_of(fidelity_utterances=0), pool, chat).score(batch)
        assert not [name for name in row if name.startswith("fidelity/")]
        _, row = ScoringStage(config_of(fidelity_utterances=3), pool, chat).score(batch)
        assert row["fidelity/utterances"] == 3
    finally:
        pool.close()


def test_the_temperature_that_influence_is_computed_with_is_saved_and_its_effect_reported(
    chat: ChatProcessor, tokens: TokenFacts, tmp_path: Path
):
    many = [
        f'{{"thoughts": "the target is {n} of {m} so I should {word}", "action": "{sign}"}}'
        for n in range(20) for m in range(5) for word, sign in (("add", "+"), ("subtract", "-"))
    ]  # fmt: skip
    pool = make_pool(chat, tokens, temperature_scaling=True)
    try:
        batch = make_batch(chat, many)
        stage = ScoringStage(config_of(scm={"temperature_scaling": True}), pool, chat)
        scored, row = stage.score(batch, 1)
        assert row["scm/held_out"] >= 16 and row["scm/temperature"] != 1
        utterances, labels = batch.ragged("response_ids", np.int32), np.stack(batch.ragged("action_labels", np.int32))
        plain, _ = pool.score(utterances, labels, weights=pool.unscaled(pool.weights))
        influence = scored.ragged("influence", np.float32)
        assert pool.unscaled(pool.weights)[0] == pool.version == 1
        countable = [tokens.countable_by_id[ids] for ids in utterances[:16]]
        changes = [abs(one - other)[can] for one, other, can in zip(influence, plain, countable, strict=False)]
        assert row["fidelity/temperature_change"] == pytest.approx(np.concatenate(changes).mean(), rel=1e-5)
        assert row["fidelity/temperature_change"] > 0

        save_scm(pool, tmp_path)
        _, later = stage.score(batch, 2)
        assert later["scm/version"] == 2 and later["scm/unscaled_ece"] != later["scm/ece"]
        load_scm(pool, tmp_path)
        assert pool.version == 1 and float(pool.state()[0]["scm.temperature"]) == row["scm/temperature"]
        again, _ = pool.score(utterances, labels)
        for value, wanted in zip(again, influence, strict=True):
            np.testing.assert_array_equal(value, wanted)
    finally:
        pool.close()


def test_a_batch_of_the_log_that_the_scm_has_learned_is_not_learned_again(
    chat: ChatProcessor, tokens: TokenFacts, tmp_path: Path
):
    """A checkpoint of update 1 in async mode: the SCM has learned batch 2 already, while the learner had not."""
    pool = make_pool(chat, tokens)
    try:
        stage = ScoringStage(config_of(mode="async"), pool, chat)
        for update in (1, 2):
            stage.score(make_batch(chat), update)
        save_scm(pool, tmp_path)
        load_scm(pool, tmp_path)
        _, row = stage.score(make_batch(chat), 2, replayed=True)
        assert pool.version == 2 and "scm/loss" not in row and row["influence/mean"] > 0
        _, row = stage.score(make_batch(chat), 3, replayed=True)  # logged after the checkpoint
        assert pool.version == 3 and "scm/loss" in row
        stage.score(make_batch(chat), 3)  # another batch 3: the run was killed before it logged the first
        assert pool.version == 4
    finally:
        pool.close()


def test_without_a_parser_the_run_goes_on_unless_its_estimator_parses(chat: ChatProcessor, tokens: TokenFacts):
    pool = make_pool(chat, tokens, parses=False)
    try:
        stage = ScoringStage(config_of(), pool, chat)
        for _ in range(2):
            _, row = stage.score(make_batch(chat))
            assert "fidelity/action_mass" in row and "fidelity/spearman" not in row
    finally:
        pool.close()
    with pytest.raises(ScoringError, match="needs the environment's parser"):
        make_pool(chat, tokens, parses=False, estimator="scm+parser")


def test_an_estimator_without_an_scm_trains_none(chat: ChatProcessor, tokens: TokenFacts):
    pool = make_pool(chat, tokens, estimator="parser")
    try:
        scored, row = ScoringStage(config_of(estimator="parser", fidelity_utterances=0), pool, chat).score(
            make_batch(chat)
        )
        assert pool.version == 0 and not [name for name in row if name.startswith("scm/")]
        assert set(np.concatenate(scored.ragged("influence", np.float32)).tolist()) == {0.0, 1.0}
        _, row = ScoringStage(config_of(estimator="parser"), pool, chat).score(make_batch(chat))
        assert pool.version == 1 and "fidelity/spearman" in row
    finally:
        pool.close()


def test_a_saved_scm_is_restored_and_one_of_another_shape_is_refused_in_one_line(
    chat: ChatProcessor, tokens: TokenFacts, tmp_path: Path
):
    pool = make_pool(chat, tokens)
    try:
        ScoringStage(config_of(), pool, chat).score(make_batch(chat))
        save_scm(pool, tmp_path)
        saved, _ = pool.state()
        ScoringStage(config_of(), pool, chat).score(make_batch(chat))
        assert pool.version == 2
        load_scm(pool, tmp_path)
        restored, facts = pool.state()
        assert pool.version == facts["version"] == 1
        assert all(restored[name].equal(value) for name, value in saved.items())

        facts["settings"]["hidden"] = 32
        (tmp_path / "scm.json").write_text(json.dumps(facts))
        with pytest.raises(CosoError, match="the saved SCM has hidden = 32, this run has 16") as error:
            load_scm(pool, tmp_path)
        assert len(str(error.value).splitlines()) == 1 and pool.version == 1
    finally:
        pool.close()
