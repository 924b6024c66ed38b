"""What holds of every game: gymnasium's checks, same bytes from the same seed, any utterance, no leak, readable art."""

import gc
import hashlib
import json
import tracemalloc
import warnings
from itertools import combinations
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import envs  # noqa: F401  (registers coso/...)
from envs.base import TextActionEnv
from envs.cards.art import card_picture
from envs.cards.deck import ALL_CARDS

GAMES = ["coso/NumberLine-v0", "coso/Blackjack-v0", "coso/EZPoints-v0", "coso/Points24-v0"]
CARD_GAMES = GAMES[1:]


def make(game: str, **kwargs: Any) -> TextActionEnv:
    env = gymnasium.make(game, **kwargs).unwrapped
    assert isinstance(env, TextActionEnv)
    return env


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("kwargs", [{}, {"invalid_action": "penalty"}, {"invalid_action": "noop"}])
def test_gymnasium_finds_no_fault(game: str, kwargs: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(game, render_mode="rgb_array", **kwargs))


def digest(game: str, seed: int, utterances: list[str]) -> str:
    env = make(game)
    found = hashlib.sha256()
    observation, info = env.reset(seed=seed)
    for utterance in utterances:
        found.update(observation["image"].tobytes() + repr((observation["prompt"], info)).encode("utf-8", "replace"))
        observation, reward, terminated, truncated, info = env.step(utterance)
        found.update(repr((reward, terminated, truncated)).encode())
        if terminated or truncated:
            observation, info = env.reset()
    return found.hexdigest()


@pytest.mark.parametrize("game", CARD_GAMES)
@given(
    st.integers(0, 2**32),
    st.lists(
        st.one_of(
            st.text(st.characters()),
            st.sampled_from(["hit", "stand", "3", "10", "+", "*", "=", "("]).map(lambda word: f'"action": "{word}"'),
        ),
        max_size=30,
    ),
)
@settings(max_examples=20, deadline=None)
def test_same_seed_and_any_utterances_give_the_same_bytes(game: str, seed: int, utterances: list[str]) -> None:
    np.random.seed(1)
    first = digest(game, seed, utterances)
    np.random.seed(2)
    assert digest(game, seed, utterances) == first


@pytest.mark.parametrize("game", CARD_GAMES)
def test_seeds_matter(game: str) -> None:
    assert len({digest(game, seed, ["?"] * 10) for seed in range(20)}) > 15


@pytest.mark.parametrize("game", GAMES)
def test_thousands_of_random_steps_leave_nothing_behind(game: str) -> None:
    """Memory after 2,000 more steps is what it was; `benchmarks/envs.py` does the same with 100,000."""
    env = make(game)
    rng = np.random.default_rng(0)
    env.reset(seed=0)

    def steps(count: int) -> None:
        for _ in range(count):
            outcome = env.step(json.dumps({"action": env.random_action(rng)}))
            if outcome[2] or outcome[3]:
                env.reset()

    for code in ALL_CARDS:  # shared art, which is drawn when it is first needed
        for width in (35, 67, 70, 135):
            card_picture(code, width)
    steps(500)
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        steps(2000)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("game", GAMES)
def test_the_prompt_is_short_and_the_experts_answer_is_in_its_format(game: str) -> None:
    env = make(game)
    rng = np.random.default_rng(0)
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        assert len(observation["prompt"].split()) <= 100
        utterance = env.expert_utterance(rng)
        keys = list(json.loads(utterance))
        positions = [observation["prompt"].rindex(f'"{key}": ') for key in keys]
        assert positions == sorted(positions) and keys[-2:] == ["thoughts", "action"]
        assert env.parse(utterance).valid


@pytest.mark.parametrize("vectorizer", ["sync", "async"])
def test_gymnasiums_vectorisers_play_the_games_as_single_environments_do(vectorizer: str) -> None:
    vector: Any = gymnasium.make_vec(
        "coso/EZPoints-v0",
        num_envs=2,
        vectorization_mode=vectorizer,
        vector_kwargs={"shared_memory": False} if vectorizer == "async" else {},
    )
    try:
        observations, _ = vector.reset(seed=[5, 6])
        for index, seed in enumerate((5, 6)):
            expected, _ = make("coso/EZPoints-v0").reset(seed=seed)
            assert np.array_equal(observations["image"][index], expected["image"])
            assert observations["prompt"][index] == expected["prompt"]
        _, rewards, terminated, _, _ = vector.step(('"action": "="', '"action": "+"'))
        assert rewards.tolist() == [-1, 0] and terminated.tolist() == [True, False]
    finally:
        vector.close()


@pytest.mark.parametrize(("canvas_to", "width"), [(300, 67), (64, 67), (96, 35)])
def test_every_two_cards_are_told_apart_at_the_models_size(canvas_to: int, width: int) -> None:
    """The smallest cards of a game, scaled as its canvas is to the model's input: some pixels differ much."""
    scale = canvas_to / 300
    small = {}
    for code in ALL_CARDS:
        picture = Image.fromarray(card_picture(code, width))
        size = (round(picture.width * scale), round(picture.height * scale))
        small[code] = np.asarray(picture.resize(size, Image.Resampling.LANCZOS), np.int16)
    for first, second in combinations(ALL_CARDS, 2):
        different = np.abs(small[first] - small[second]).max(axis=-1) > 60
        assert different.sum() >= 8, (first, second, int(different.sum()))
