"""The environment under test, and a player of it that checks every answer and names the call in every error."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

import envs  # noqa: F401  registers ours
from envs.contract.result import Broken
from envs.labels import LabelSpace
from envs.output import EnvironmentOutput, EnvironmentOutputError

#: Of the first episode of a check.
SEED = 1
#: What a policy may say that names no action: nothing, too much, halves of characters, control tokens, templates.
NONSENSE = (
    "",
    " \n\t\r",
    "I would rather not act.",
    "\0\x1b[2J\x7f",
    "{",
    '{"action":',
    '{"action": null, "action": {}}',
    "\ud83d",
    '{"thoughts": "\udc00", "action": "\ud83d"}',
    "<image> <|image_pad|> <|vision_start|> [IMG] <start_of_image>",
    "<|im_end|>\n<|im_start|>system\n<|endoftext|></s><eos><end_of_turn>",
    "{0} {prompt} {} %s %(action)s ${HOME} {{ prompt }} {% raw %}",
    "'; DROP TABLE actions; -- $(reboot) `reboot` && reboot",
    "e\u0301 日本語 عربى 🏳️‍🌈 \u202e \ufeff",
    "-1e999999 NaN Infinity 0x10 99999999999999999999",
    "[" * 100_000,
    '"action": ' * 20_000,
    "a" * 1_000_000,
)


@dataclass(frozen=True)
class Environment:
    """The environment under test.

    kwargs: its keyword arguments; utterances: valid ones that its author knows; deadline_s: of one reset or step in a
    run, seconds; play_s: how long a check may play, seconds.
    """

    env_id: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    utterances: tuple[str, ...] = ()
    deadline_s: float = 30.0
    play_s: float = 10.0

    def make(self) -> gymnasium.Env[Any, Any]:
        """A new one, made as a run makes it. Raises `Broken`."""
        try:
            return gymnasium.make(self.env_id, disable_env_checker=True, **self.kwargs)
        except Exception as error:
            given = f" with {self.kwargs}" if self.kwargs else ""
            raise Broken(
                f"gymnasium.make({self.env_id!r}){given} fails: {described(error)}. The id must be registered when its "
                "module is imported, and the module must be where Python looks (PYTHONPATH)"
            ) from error


@dataclass(frozen=True)
class Outcome:
    """What a step returned, checked. returned: as the environment returned it."""

    observation: dict[str, Any]
    reward: float
    over: bool
    info: dict[str, Any]
    returned: tuple[Any, ...]


class Player:
    """One environment that is played. Each call checks what came back and raises `Broken` with the calls before it."""

    def __init__(self, subject: Environment) -> None:
        self.subject = subject
        self.env = subject.make()
        self.over = True
        self.calls = "gymnasium.make"
        self.reset_s: list[float] = []
        self.step_s: list[float] = []
        self._output = EnvironmentOutput(subject.env_id, label_space(self.env, subject.env_id))
        self._steps = 0

    @property
    def game(self) -> Any:
        """The environment without gymnasium's wrappers."""
        return self.env.unwrapped

    def __enter__(self) -> Player:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        # The error inside says more than one of closing.
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self.env.close()

    def reset(self, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """A new episode: (observation, info)."""
        self.calls, self._steps = f"reset(seed={seed})", 0
        begun = time.perf_counter()
        returned = self._call(lambda: self.env.reset(seed=seed, options=None))  # as a run calls it
        self.reset_s.append(time.perf_counter() - begun)
        self.over = False
        return self._checked(lambda: self._output.reset(returned))  # type: ignore[no-any-return]

    def step(self, utterance: str) -> Outcome:
        """One step."""
        before = f"{self._steps} steps, then " if self._steps else ""
        self.calls = f"{self.calls.partition(', then ')[0]}, then {before}step({shown(utterance)})"
        begun = time.perf_counter()
        returned = self._call(lambda: self.env.step(utterance))
        self.step_s.append(time.perf_counter() - begun)
        self._steps += 1
        observation, reward, terminated, truncated, info = self._checked(lambda: self._output.step(returned, utterance))
        self.over = terminated or truncated
        return Outcome(observation, reward, self.over, info, returned)

    def answer(self, rng: np.random.Generator, cheap: bool = False) -> str:
        """An utterance for the current state: the expert's, a random action, a given one; else nonsense.

        cheap: the expert, who may think for long and remember much, is asked last."""
        sources = [self._random, self._given, self._expert]
        for number in (0, 1, 2) if cheap else rng.permutation(3):
            utterance = sources[number](rng)
            if utterance is not None:
                return utterance
        return NONSENSE[rng.integers(len(NONSENSE) - 3)]  # the last ones are long

    def play(self, steps: int, rng: np.random.Generator, cheap: bool = False) -> Iterator[Outcome]:
        """Up to `steps` steps of as many episodes as that takes, within the time for one check."""
        deadline = time.monotonic() + self.subject.play_s
        for number in range(steps):
            if self.over:
                self.reset(SEED + number)
            yield self.step(self.answer(rng, cheap))
            if time.monotonic() > deadline:
                return

    def _expert(self, rng: np.random.Generator) -> str | None:
        try:
            return self.game.expert_utterance(rng)  # type: ignore[no-any-return]
        except (AttributeError, NotImplementedError):
            return None

    def _random(self, rng: np.random.Generator) -> str | None:
        try:
            action = self.game.random_action(rng)
            candidates = (action, json.dumps({"action": action}))
            return next((each for each in candidates if self.game.parse(each).valid), None)
        except (AttributeError, TypeError):
            return None

    def _given(self, rng: np.random.Generator) -> str | None:
        given = self.subject.utterances
        return given[rng.integers(len(given))] if given else None

    def _call(self, function: Any) -> Any:
        try:
            return function()
        except Exception as error:
            raise Broken(
                f"{self.calls} raises {described(error)}. Any string has a defined outcome: an utterance that cannot "
                "be done is invalid (see envs.base.TextActionEnv), and only a failure of the environment itself is an "
                "exception"
            ) from error

    def _checked(self, function: Any) -> Any:
        try:
            return function()
        except EnvironmentOutputError as error:
            raise Broken(f"{error}, in {self.calls}") from None


def label_space(env: gymnasium.Env[Any, Any], env_id: str) -> LabelSpace:
    """The environment's label space. Raises `Broken`."""
    found = getattr(env.unwrapped, "label_space", None)
    if not isinstance(found, LabelSpace):
        raise Broken(
            f"{env_id} has no label_space (it is {shown(found)}): give the class a property label_space that returns "
            'an envs.labels.LabelSpace with one head per number in info["action_labels"], or derive it from '
            "envs.base.TextActionEnv"
        )
    return found


def described(error: BaseException) -> str:
    """Type, message and place of an exception: the place in the environment's own code, if it passed there."""
    try:
        said = str(error)[:500]
    except Exception:
        said = "(no message: its __str__ fails)"
    frames = traceback.extract_tb(error.__traceback__)
    others = (os.path.dirname(__file__), os.path.dirname(os.__file__), "<frozen")  # this package, libraries
    theirs = [
        frame for frame in frames if not frame.filename.startswith(others) and "site-packages" not in frame.filename
    ]
    place = theirs[-1] if theirs else frames[-1] if frames else None
    where = f" ({place.filename}:{place.lineno} in {place.name})" if place else ""
    return f"{type(error).__name__}: {said}{where}"


def shown(value: Any) -> str:
    """A value for a message: short, printable."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
