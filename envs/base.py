"""The environment contract: an image and a prompt in, an utterance out, every outcome defined as data."""

from __future__ import annotations

import string
from abc import abstractmethod
from typing import Any, ClassVar, Literal, get_args

import gymnasium
import numpy as np
from numpy.typing import NDArray

from envs.labels import LabelSpace, ParsedAction
from envs.parsing import KeywordParser

InvalidActionPolicy = Literal["random", "penalty", "noop"]
Observation = dict[str, Any]


class AnyText(gymnasium.spaces.Text):
    """The space of every string: gymnasium's `Text` would need all of Unicode as its character set.

    Samples are printable ASCII of up to `max_sample_length` characters.
    """

    def __init__(self, max_sample_length: int = 200, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_sample_length, min_length=0, charset=string.printable, seed=seed)

    def contains(self, x: Any) -> bool:
        """Whether x is a string, of whatever length and characters."""
        return isinstance(x, str)

    def __repr__(self) -> str:
        return f"AnyText(max_sample_length={self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText) and self.max_length == other.max_length


class TextActionEnv(gymnasium.Env[Observation, str]):
    """A task seen as a picture and a prompt and acted on in words.

    Observation: `{"image": uint8 (H, W, 3) RGB, "prompt": str}`. Action: the raw utterance, any string.

    `step` returns in `info`: `action` (canonical text, "" when the utterance is invalid), `action_labels`
    (int32 (K,), -1 where a head does not apply; all -1 when invalid), `valid`, `success` (the task was
    accomplished by this step), `executed_action` (what was really done: with `invalid_action="random"` the
    action drawn, else "" for an invalid utterance) and `state` (a copy, for `reset(options={"state": ...})`
    until the episode is over).

    An invalid utterance is, by `invalid_action`: "random" = a uniformly random action from `np_random`;
    "penalty" = no move and `invalid_penalty`; "noop" = no move and reward 0. It always uses up a step.

    A game of keywords gives `action_words`, `image_shape`, and the methods below that are abstract; one with
    richer actions also overrides `label_space`, `parse` and `random_action`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 2}
    action_words: ClassVar[tuple[str, ...]] = ()
    image_shape: ClassVar[tuple[int, int, int]] = (300, 300, 3)
    invalid_penalty: ClassVar[float] = -1.0
    state_label_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, invalid_action: InvalidActionPolicy = "random", render_mode: str | None = None) -> None:
        if invalid_action not in get_args(InvalidActionPolicy):
            policies = ", ".join(get_args(InvalidActionPolicy))
            raise ValueError(f"invalid_action must be one of {policies}, not {invalid_action!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        self.invalid_action = invalid_action
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Dict(
            image=gymnasium.spaces.Box(0, 255, self.image_shape, np.uint8), prompt=AnyText()
        )
        self.action_space = AnyText()
        self._keyword_parser = KeywordParser(self.action_words) if self.action_words else None
        self._episode_over = True

    # What an environment supplies.

    @property
    @abstractmethod
    def prompt(self) -> str:
        """The task, its rules and the answer format, for the present state."""

    @property
    @abstractmethod
    def state(self) -> dict[str, Any]:
        """A fresh copy of the present state, as `reset(options={"state": ...})` takes it."""

    @property
    def horizon(self) -> int | None:
        """Number of steps after which the environment truncates an episode, or None."""
        return None

    @property
    @abstractmethod
    def state_label_sizes(self) -> tuple[int, ...]:
        """Number of values of each of `state_labels`, (M,)."""

    @abstractmethod
    def state_labels(self) -> NDArray[np.int32]:
        """What a reader must see in the present picture: int32 (M,), named by `state_label_names`."""

    @abstractmethod
    def expert_utterance(self, rng: np.random.Generator, noise: float = 0.0, habit: str = "") -> str:
        """A full answer in the prompt's format for the present state.

        With probability `noise` in [0, 1] the action, and the thought with it, is not the expert's but `habit`, or
        uniformly random where no habit is given. Draws only from `rng`.
        """

    def with_noise(self, action: str, rng: np.random.Generator, noise: float, habit: str) -> str:
        """The expert's `action`, or in a share `noise` of calls the habit or a random action; for `expert_utterance`.

        Raises ValueError for a habit that is not one of `action_words`.
        """
        if habit and habit not in self.action_words:
            raise ValueError(f"a habit must be one of {', '.join(self.action_words)}, not {habit!r}")
        if rng.random() >= noise:
            return action
        return habit or self.action_words[int(rng.integers(len(self.action_words)))]

    @abstractmethod
    def _set_state(self, state: dict[str, Any] | None) -> None:
        """Begin an episode in the given state, or in one drawn from `np_random`.

        Raises ValueError, saying what is wrong, where the state is not one of this task's.
        """

    @abstractmethod
    def _act(self, action: str) -> tuple[float, bool, bool]:
        """Do a canonical action, or nothing for "", and return (reward, terminated, success)."""

    @abstractmethod
    def _picture(self) -> NDArray[np.uint8]:
        """The present screen, uint8 `image_shape`, in memory that nobody else holds."""

    # What every environment does alike.

    @property
    def label_space(self) -> LabelSpace:
        """The heads of `action_labels`."""
        return self._keywords().label_space

    def parse(self, utterance: str) -> ParsedAction:
        """What the environment takes an utterance to mean; does not depend on the state."""
        return self._keywords().parse(utterance)

    def random_action(self) -> str:
        """A uniformly random canonical action, drawn from `np_random`."""
        words = self._keywords().words
        return words[int(self.np_random.integers(len(words)))]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode; `options={"state": {...}}` says in which state. `info` holds `state`."""
        super().reset(seed=seed)
        options = options or {}
        if not isinstance(options, dict) or set(options) - {"state"}:
            raise ValueError(f"reset takes options={{'state': {{...}}}}, not {options!r}")
        state = options.get("state")
        if state is not None and not isinstance(state, dict):
            raise ValueError(f"options['state'] must be a dict, not {state!r}")
        self._set_state(state)
        self._steps = 0
        self._episode_over = False
        return self._observation(), {"state": self.state}

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Parse an utterance, act, and return (observation, reward, terminated, truncated, info)."""
        if not isinstance(action, str):
            raise TypeError(f"an action is an utterance (str), not {type(action).__name__}")
        if self._episode_over:
            raise gymnasium.error.ResetNeeded("the episode is over: call reset() before the next step()")
        parsed = self.parse(action)
        executed = parsed.action
        if not parsed.valid and self.invalid_action == "random":
            executed = self.random_action()
        reward, terminated, success = self._act(executed)
        if not parsed.valid and self.invalid_action == "penalty":
            reward = self.invalid_penalty
        self._steps += 1
        truncated = not terminated and self.horizon is not None and self._steps >= self.horizon
        self._episode_over = terminated or truncated
        info = {
            "action": parsed.action,
            "action_labels": parsed.labels,
            "valid": parsed.valid,
            "success": success,
            "executed_action": executed,
            "state": self.state,
        }
        return self._observation(), float(reward), terminated, truncated, info

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """The present screen, uint8 (H, W, 3), in render mode "rgb_array"; else None."""
        return self._picture() if self.render_mode == "rgb_array" else None

    def _observation(self) -> Observation:
        return {"image": self._picture(), "prompt": self.prompt}

    def _keywords(self) -> KeywordParser:
        if self._keyword_parser is None:
            raise TypeError(f"{type(self).__name__} has no action_words, so it must define how it parses")
        return self._keyword_parser
