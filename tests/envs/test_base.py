"""What every text-action environment gets from the base: settings, hooks, vectorisers."""

from typing import Any

import gymnasium
import numpy as np
import pytest

import envs  # noqa: F401  (registers coso/...)
from envs.base import TextActionEnv
from envs.spaces import image_space

LONG_PROMPT = "Ö\U0001f0a1 " * 200


class Minimal(TextActionEnv):
    """Only what has no default: one word, one step."""

    action_words = ("go",)

    def __init__(self, side: int = 8, **kwargs: Any) -> None:
        self.image_shape = (side, side, 3)
        super().__init__(**kwargs)

    @property
    def prompt(self) -> str:
        return LONG_PROMPT

    def _set_state(self, state: dict[str, Any] | None) -> None:
        pass

    def _act(self, action: str) -> tuple[float, bool, bool]:
        return 1.0, True, True

    def _picture(self) -> np.ndarray:
        return np.full(self.image_shape, 7, np.uint8)


def test_an_environment_without_state_labels_or_expert_says_so() -> None:
    env = Minimal(side=16)
    observation, info = env.reset(seed=0)
    assert env.observation_space.contains(observation) and observation["image"].shape == (16, 16, 3)
    assert info == {"state": {}}
    assert env.state_label_sizes == () and env.state_labels().shape == (0,)
    with pytest.raises(NotImplementedError, match="Minimal has no expert"):
        env.expert_utterance(np.random.default_rng(0))


def test_what_is_hidden_and_what_is_added_show_in_info() -> None:
    class Hiding(Minimal):
        @property
        def state(self) -> dict[str, Any]:
            return {"shown": 1, "hidden": 2}

        @property
        def public_state(self) -> dict[str, Any]:
            return {"shown": 1}

        def extra_info(self) -> dict[str, Any]:
            return {"more": 3}

    env = Hiding()
    _, info = env.reset(seed=0)
    assert info == {"state": {"shown": 1}, "more": 3}
    _, _, _, _, info = env.step('"action": go')
    assert (info["state"], info["more"], info["valid"]) == ({"shown": 1}, 3, True)


def test_noise_draws_from_the_generator_it_is_given() -> None:
    env = gymnasium.make("coso/NumberLine-v0").unwrapped
    assert isinstance(env, TextActionEnv)
    env.reset(seed=0)
    before = env.np_random.bit_generator.state
    rng = np.random.default_rng(0)
    assert {env.with_noise("+", rng, 1.0, "") for _ in range(50)} == {"+", "-"}
    assert {env.with_noise("+", rng, 1.0, "-") for _ in range(50)} == {"-"}
    assert {env.with_noise("+", rng, 0.0, "-") for _ in range(50)} == {"+"}
    assert env.np_random.bit_generator.state == before
    with pytest.raises(ValueError, match="a habit must be one of -, \\+"):
        env.with_noise("+", rng, 0.5, "add")


@pytest.mark.parametrize("vectorizer", ["sync", "async"])
def test_gymnasiums_own_vectorisers_run_it(vectorizer: str) -> None:
    """Observations, rewards and ends are those of the single environments; prompts are longer than a sample."""
    makers = [Minimal, Minimal]
    vector: Any = (
        gymnasium.vector.SyncVectorEnv(makers)
        if vectorizer == "sync"
        else gymnasium.vector.AsyncVectorEnv(makers, shared_memory=False, context="fork")
    )
    try:
        observations, _ = vector.reset(seed=3)
        assert observations["image"].shape == (2, 8, 8, 3) and (observations["image"] == 7).all()
        assert observations["prompt"] == (LONG_PROMPT, LONG_PROMPT)
        _, rewards, terminated, truncated, infos = vector.step(('"action": go', "nonsense"))
        assert rewards.tolist() == [1.0, 1.0] and terminated.all() and not truncated.any()
        assert infos["valid"].tolist() == [True, False]
        assert infos["action_labels"].tolist() == [[0], [-1]]
    finally:
        vector.close()


def test_the_space_of_pictures_is_gymnasiums_own_but_small() -> None:
    space, plain = image_space((30, 20, 3)), gymnasium.spaces.Box(0, 255, (30, 20, 3), np.uint8)
    assert space == plain and repr(space) == repr(plain) and space.is_bounded()
    space.seed(1), plain.seed(1)
    assert np.array_equal(space.sample(), plain.sample()) and space.contains(plain.sample())
    assert not space.contains(np.zeros((30, 20), np.uint8))
    assert {bound.strides for bound in (space.low, space.high, space.bounded_below)} == {(0, 0, 0)}
    batched = gymnasium.vector.utils.batch_space(space, 4)
    assert batched.shape == (4, 30, 20, 3)


def test_sharing_memory_which_would_freeze_the_prompts_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="shared_memory=False"):
        gymnasium.vector.AsyncVectorEnv([Minimal])
