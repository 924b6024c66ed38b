"""The parser estimator is exact: it says what the environment would read without the window."""

import pickle
from functools import partial

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import envs  # noqa: F401
from envs.action_parser import NoParser, action_parser
from scoring.effects.estimators import make_estimator
from scoring.effects.parser_effects import Outcome, ParserInterventions, ParserSource
from scoring.effects.tokens import token_facts
from scoring.scm.model import StructuralCausalModel
from scoring.scm.shape import ScmSizes
from scoring.settings import ScmEncoderSettings, ScoringSettings
from tests.scoring.languages import Language, word_tokenizer

TEXT = '{ "thoughts": "the target is - 3 so I add", "action": "+" }'
WORDS = sorted({*TEXT.split(), '"subtract', "-"})
ENCODER = ScmEncoderSettings(hidden=8, layers=1, heads=1)
SETTINGS = ScoringSettings(window=1, batch_tokens=256)


def number_line(window, null_id=0):
    tokenizer = word_tokenizer(WORDS)
    source = ParserSource(tokenizer=tokenizer, parser=action_parser("coso/NumberLine-v0", {}))
    return tokenizer, ParserInterventions(source, window=window, null_id=null_id)


@given(st.lists(st.sampled_from(WORDS), max_size=14), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_outcomes_equal_those_of_the_text_without_the_window(words, window):
    parse = action_parser("coso/NumberLine-v0", {}).parse
    tokenizer, interventions = number_line(window)
    labels = parse(" ".join(words)).labels
    ids = np.array([1 + WORDS.index(word) for word in words], np.int32)
    found = interventions.outcomes(ids, np.arange(len(ids)))
    for i in range(len(words)):
        parsed = parse(" ".join(words[:i] + words[i + window :]))
        changed = Outcome.OTHER if parsed.valid else Outcome.NONE
        assert found[i] == (Outcome.SAME if (parsed.labels == labels).all() else changed)


def test_a_null_token_that_is_not_special_adds_no_text():
    words = TEXT.split()
    ids = np.array([1 + WORDS.index(word) for word in words], np.int32)
    shown = WORDS.index("-") + 1  # as a null token it would add a `-` beside the `+`
    _, interventions = number_line(1, null_id=shown)
    _, by_padding = number_line(1)
    where = np.arange(len(ids))
    np.testing.assert_array_equal(interventions.outcomes(ids, where), by_padding.outcomes(ids, where))


@pytest.mark.parametrize("name", ["parser", "scm+parser"])
def test_the_parser_is_exact_on_a_language_whose_rule_is_known(name):
    language = Language(slots=6, causal=(1, 4))
    tokenizer = language.tokenizer()
    interventions = ParserInterventions(ParserSource(tokenizer=tokenizer, parser=language), window=1, null_id=0)
    scm = StructuralCausalModel(ENCODER, ScmSizes(vocab_size=len(tokenizer), head_sizes=language.head_sizes)).eval()
    estimator = make_estimator(name, token_facts(tokenizer), SETTINGS, scm=scm, interventions=interventions)
    utterances, labels = language.sample(20, seed=0)
    for ids, row in zip(utterances, labels, strict=True):
        scored = estimator.score(ids, row)
        assert np.flatnonzero(scored.values).tolist() == [2, 3, 8, 9]  # keys and values of the slots that are read
        assert scored.values[[2, 3, 8, 9]].tolist() == pytest.approx([1.0] * 4) and scored.counterfactuals == 12


def test_the_scm_gives_the_effect_where_nothing_parses():
    """One slot is read: without its key or value there is no action, so the SCM's effects of the two remain."""
    language = Language(slots=3, causal=(1,))
    tokenizer = language.tokenizer()
    facts = token_facts(tokenizer)
    interventions = ParserInterventions(ParserSource(tokenizer=tokenizer, parser=language), window=1, null_id=0)
    scm = StructuralCausalModel(ENCODER, ScmSizes(vocab_size=len(tokenizer), head_sizes=(6,))).double().eval()
    make = partial(make_estimator, settings=SETTINGS, scm=scm, interventions=interventions)
    (ids,), (labels,) = language.sample(1, seed=3)
    effects, _ = make("scm", facts).effects(ids, np.array([2, 3]), labels)
    both = make("scm+parser", facts).score(ids, labels).values
    np.testing.assert_allclose(both[[2, 3]], np.sqrt(effects / effects.max()), atol=1e-6)
    assert np.delete(both, [2, 3]).tolist() == [0] * 4
    assert make("parser", facts).score(ids, labels).values.tolist() == pytest.approx([0, 0, 1, 1, 0, 0])


def test_tokens_of_a_text_without_an_action_change_nothing():
    ids = np.array([1 + WORDS.index(word) for word in ("target", "so")], np.int32)
    assert number_line(1)[1].outcomes(ids, np.arange(2)).tolist() == [Outcome.SAME] * 2


@pytest.mark.parametrize("name", ["coso/NumberLine-v0", "coso/Points24-v0", "coso/Blackjack-v0"])
def test_a_pickled_parser_reads_as_its_environment_does(name):
    env = gymnasium.make(name).unwrapped
    parser = pickle.loads(pickle.dumps(action_parser(name, {})))
    for text in ['{"action": "+"}', '{"action": "10"}', '{"action": "hit"}', "", '"action": "+" or "-"']:
        here, there = env.parse(text), parser.parse(text)
        assert (here.action, here.valid) == (there.action, there.valid)
        np.testing.assert_array_equal(here.labels, there.labels)


def test_an_environment_without_a_parser_is_an_error_that_names_it():
    class Mute(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Discrete(2)

    if "coso-test/Mute-v0" not in gymnasium.registry:
        gymnasium.register("coso-test/Mute-v0", entry_point=Mute)
    with pytest.raises(NoParser, match="coso-test/Mute-v0 has no parser"):
        action_parser("coso-test/Mute-v0", {})
