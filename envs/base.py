"""The environment contract: the observation is a picture and a prompt, the action an utterance."""

from __future__ import annotations

import json
from abc import abstractmethod
from typing import Any, ClassVar, Literal, get_args

import gymnasium
import numpy as np
from numpy.typing import NDArray

from envs.labels import LabelSpace, ParsedAction
from envs.parsing import KeywordParser, Parser
from envs.spaces import AnyText, image_space

InvalidActionPolicy = Literal["random", "penalty", "noop"]
Observation = dict[str, Any]


class TextActionEnv(gymnasium.Env[Observation, str]):
    """A task whose observation is a picture and a prompt and whose action is text.

    Observation: `{"image": uint8 (H, W, 3) RGB, "prompt": str}`. Action: the raw utterance, any string.

    `step` returns in `info`: `action` (canonical text, "" when the utterance is invalid), `action_labels`
    (int32 (K,), -1 where a head does not apply; all -1 when invalid), `valid`, `action_start` (where the utterance's
    action part begins, or None, see `ParsedAction`), `success` (this step accomplished the task), `executed_action`
    (with `invalid_action="random"` the random action, else "" for an invalid utterance), `state` (a copy of what a
    player may know, for `reset(options={"state": ...})` until the episode is over) and the entries of `extra_info`.

    Runs report two measures of success: `info["success"]` at the last step, and the published one, an episode
    return above 0.

    `invalid_action` sets what an invalid utterance does: "random" = a uniformly random action from `np_random`;
    "penalty" = no move and `invalid_penalty`; "noop" = no move and reward 0. It always uses up a step.

    A game with keywords defines `action_words`, `image_shape` and the abstract methods. An environment with richer
    actions also overrides `label_space`, `parse` and `random_action`. A constructor may set `action_words` and
    `image_shape` before it calls this class's constructor. `envs/prompts.py` helps to write prompts and answers.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 2}
    action_words: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] = (300, 300, 3)
    invalid_penalty: ClassVar[float] = -1.0
    state_label_names: tuple[str, ...] = ()

    def __init__(self, invalid_action: InvalidActionPolicy = "random", render_mode: str | None = None) -> None:
        if invalid_action not in get_args(InvalidActionPolicy):
            policies = ", ".join(get_args(InvalidActionPolicy))
            raise ValueError(f"invalid_action must be one of {policies}, not {invalid_action!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        self.invalid_action = invalid_action
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Dict(image=image_space(self.image_shape), prompt=AnyText())
        self.action_space = AnyText()
        self._keyword_parser = KeywordParser(self.action_words) if self.action_words else None
        self._episode_over = True

    # To be defined by an environment.

    @property
    def shorthand_help(self) -> str:
        """A short description of what a person may type instead of a whole utterance; "" if nothing."""
        return f"an action word ({' '.join(self.action_words)})" if self.action_words else ""

    def from_shorthand(self, line: str) -> str | None:
        """The utterance for a line in the form of `shorthand_help`, or None if the line has another form."""
        word = line.strip().lower()
        return json.dumps({"thoughts": "", "action": word}) if word in self.action_words else None

    @property
    @abstractmethod
    def prompt(self) -> str:
        """The task, its rules and the answer format, for the current state."""

    @property
    def state(self) -> dict[str, Any]:
        """A copy of the whole current state, for `reset(options={"state": ...})`; {} if reset takes no state."""
        return {}

    @property
    def public_state(self) -> dict[str, Any]:
        """The state without what a player must not know, such as hidden cards; `info` shows this."""
        return self.state

    def extra_info(self) -> dict[str, Any]:
        """More entries for the `info` of `reset` and `step`. They must be copies, not live objects."""
        return {}

    @property
    def horizon(self) -> int | None:
        """Number of steps after which the environment truncates an episode, or None."""
        return None

    @property
    def state_label_sizes(self) -> tuple[int, ...]:
        """Number of values of each of `state_labels`, (M,); empty if there are none."""
        return ()

    def state_labels(self) -> NDArray[np.int32]:
        """Labels of what the current picture shows, to pre-train a vision tower: int32 (M,), -1 where a label does not
        apply. `state_label_names` names them.
        """
        return np.empty(0, np.int32)

    def expert_utterance(self, rng: np.random.Generator, noise: float = 0.0, habit: str = "") -> str:
        """The expert's full answer for the current state, in the prompt's format.

        With probability `noise` in [0, 1] the action and its thought are `habit`, or uniformly random without a habit.
        Draws only from `rng`. Raises NotImplementedError if the environment has no expert.
        """
        raise NotImplementedError(f"{type(self).__name__} has no expert (it does not define expert_utterance)")

    def with_noise(self, action: str, rng: np.random.Generator, noise: float, habit: str) -> str:
        """The expert's `action`, or with probability `noise` the habit or a random action; for `expert_utterance`.

        Raises ValueError if the habit is not one of `action_words` (if there are any).
        """
        if habit and self.action_words and habit not in self.action_words:
            raise ValueError(f"a habit must be one of {', '.join(self.action_words)}, not {habit!r}")
        if rng.random() >= noise:
            return action
        return habit or self.random_action(rng)

    @abstractmethod
    def _set_state(self, state: dict[str, Any] | None) -> None:
        """Start an episode in the given state, or in one drawn from `np_random`.

        Raises ValueError that says what is wrong with an invalid state.
        """

    @abstractmethod
    def _act(self, action: str) -> tuple[float, bool, bool]:
        """Execute a canonical action ("": do nothing) and return (reward, terminated, success)."""

    @abstractmethod
    def _picture(self) -> NDArray[np.uint8]:
        """The current screen, uint8 `image_shape`, as a new array."""

    # Common to all environments.

    @property
    def label_space(self) -> LabelSpace:
        """The heads of `action_labels`."""
        return self._keywords().label_space

    def parse(self, utterance: str) -> ParsedAction:
        """Parse an utterance; never raises. In a game with keywords the result does not depend on the state."""
        return self._keywords().parse(utterance)

    @property
    def parser(self) -> Parser:
        """A parser that needs no state. It can be pickled and outlives the environment."""
        return self._keywords()

    def random_action(self, rng: np.random.Generator | None = None) -> str:
        """A uniformly random canonical action, drawn from `rng`, or from `np_random` if `rng` is None."""
        words = self._keywords().words
        return words[int((self.np_random if rng is None else rng).integers(len(words)))]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode, with `options={"state": {...}}` in that state. `info` holds `state` and `extra_info`."""
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
        return self._observation(), {"state": self.public_state, **self.extra_info()}

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
        truncated = not terminated and self._is_cut_off()
        self._episode_over = terminated or truncated
        info = {
            "action": parsed.action,
            "action_labels": parsed.labels,
            "valid": parsed.valid,
            "action_start": parsed.start,
            "success": success,
            "executed_action": executed,
            "state": self.public_state,
            **self.extra_info(),
        }
        return self._observation(), float(reward), terminated, truncated, info

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """The current screen, uint8 (H, W, 3), in render mode "rgb_array"; else None."""
        return self._picture() if self.render_mode == "rgb_array" else None

    def _is_cut_off(self) -> bool:
        """Whether the episode is truncated now, after a step that did not end it."""
        return self.horizon is not None and self._steps >= self.horizon

    def _observation(self) -> Observation:
        return {"image": self._picture(), "prompt": self.prompt}

    def _keywords(self) -> KeywordParser:
        if self._keyword_parser is None:
            raise TypeError(f"{type(self).__name__} has no action_words, so it must define how it parses")
        return self._keyword_parser
