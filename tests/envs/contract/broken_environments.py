"""A small game that keeps the contract, and versions of it with one fault each: `coso-broken/CLASS-v0`."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import time
from typing import Any

import gymnasium
import numpy as np

from envs.base import TextActionEnv
from envs.contract.player import Environment
from envs.labels import ParsedAction
from envs.parsing import KeywordParser
from envs.prompts import answer_format, json_answer

WORD = '{"action": "press"}'


class Sound(TextActionEnv):
    """A lamp that is on or off: press the switch, or wait; four steps an episode."""

    action_words = ("press", "wait")
    image_shape = (12, 16, 3)
    horizon = 4

    @property
    def prompt(self) -> str:
        return "Switch the lamp on. " + answer_format({"thoughts": "?"}, self.action_words)

    def expert_utterance(self, rng: np.random.Generator, noise: float = 0.0, habit: str = "") -> str:
        return json_answer({"thoughts": "?"}, "wait" if self._lamp else "press")

    def _set_state(self, state: dict[str, Any] | None) -> None:
        self._lamp = int(self.np_random.integers(2))

    def _act(self, action: str) -> tuple[float, bool, bool]:
        self._lamp = 1 - self._lamp if action == "press" else self._lamp
        return float(self._lamp), False, bool(self._lamp)

    def _picture(self) -> np.ndarray:
        return np.full(self.image_shape, 200 if self._lamp else 20, np.uint8)


class NoLabels(gymnasium.Env):
    """An environment of another kind."""

    observation_space = gymnasium.spaces.Discrete(2)
    action_space = gymnasium.spaces.Discrete(2)


class Changed(Sound):
    """What `step` returns is changed by `change`."""

    def step(self, action: str) -> Any:
        return self.change(*super().step(action), action)

    def change(self, observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any, action: str) -> Any:
        return observation, reward, terminated, truncated, info


class NotANumber(Changed):
    def change(self, observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any, action: str) -> Any:
        return observation, float("nan") if self._steps == 3 else reward, terminated, truncated, info


class NoSuccess(Changed):
    def change(self, observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any, action: str) -> Any:
        del info["success"]
        return observation, reward, terminated, truncated, info


class LabelsOfTheInvalid(Changed):
    def change(self, observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any, action: str) -> Any:
        return observation, reward, terminated, truncated, {**info, "action_labels": np.array([0], np.int32)}


class LockInInfo(Changed):
    def change(self, observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any, action: str) -> Any:
        return observation, reward, terminated, truncated, {**info, "lock": threading.Lock()}


class PlainBox(Sound):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.observation_space = gymnasium.spaces.Box(0, 255, self.image_shape, np.uint8)  # type: ignore[assignment]


class FewCharacters(Sound):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.action_space = gymnasium.spaces.Text(100)


class Grows(Sound):
    def _picture(self) -> np.ndarray:
        return np.zeros((12 + self._steps, 16, 3), np.uint8)


class Encodes(Sound):
    def parse(self, utterance: str) -> ParsedAction:
        utterance.encode()  # a lone surrogate cannot be encoded
        return super().parse(utterance)


class GlobalChance(Sound):
    def _set_state(self, state: dict[str, Any] | None) -> None:
        super()._set_state(state)
        self._colour = int(np.random.randint(256))

    def _picture(self) -> np.ndarray:
        return np.full(self.image_shape, self._colour, np.uint8)


class OrderOfASet(Sound):
    @property
    def prompt(self) -> str:
        return " ".join({"red", "green", "blue", "yellow", "white", "black"})


class LiveImage(Sound):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._canvas = np.zeros(self.image_shape, np.uint8)

    def _picture(self) -> np.ndarray:
        self._canvas[:] = 10 * self._steps + self._lamp
        return self._canvas


class Endless(Sound):
    horizon = None


class RemembersTheLastEpisode(Sound):
    def _set_state(self, state: dict[str, Any] | None) -> None:
        super()._set_state(state)
        self._pressed = getattr(self, "_pressed", 0)

    def _act(self, action: str) -> tuple[float, bool, bool]:
        self._pressed += 1
        return super()._act(action)

    def _picture(self) -> np.ndarray:
        return np.full(self.image_shape, min(self._pressed, 255), np.uint8)


class SpoiledByAStepTooMany(Sound):
    spoiled = 0

    def step(self, action: str) -> Any:
        if self._episode_over:
            self.spoiled = 1
        return super().step(action)

    def _picture(self) -> np.ndarray:
        return super()._picture() + np.uint8(self.spoiled)


class ClosesOnce(Sound):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


class TwoParsers(Sound):
    parser = KeywordParser(("wait", "press"))  # another order than that of step


class ExpertWithoutWords(Sound):
    def expert_utterance(self, rng: np.random.Generator, noise: float = 0.0, habit: str = "") -> str:
        return json_answer({}, "switch it")


class ExpertWithTheGamesChance(Sound):
    def expert_utterance(self, rng: np.random.Generator, noise: float = 0.0, habit: str = "") -> str:
        return json_answer({}, self.random_action())


class NoOptions(Sound):
    def reset(self, *, seed: int | None = None) -> Any:  # type: ignore[override]
        return super().reset(seed=seed)


class Slow(Sound):
    def _act(self, action: str) -> tuple[float, bool, bool]:
        time.sleep(0.06)
        return super()._act(action)


class KeepsPictures(Sound):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._album: list[np.ndarray] = []

    def _picture(self) -> np.ndarray:
        self._album.append(np.zeros((40, 40, 3), np.uint8))
        return super()._picture()


class KeepsFiles(Sound):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._files: list[Any] = []

    def _set_state(self, state: dict[str, Any] | None) -> None:
        super()._set_state(state)
        self._files.append(tempfile.TemporaryFile())  # noqa: SIM115  that is the fault


class Hangs(Sound):
    def _act(self, action: str) -> tuple[float, bool, bool]:
        time.sleep(3600)
        return super()._act(action)


class Leaves(Sound):
    def _act(self, action: str) -> tuple[float, bool, bool]:
        print("the emulator has no licence", flush=True)
        os._exit(3)


class Crashes(Sound):
    def _act(self, action: str) -> tuple[float, bool, bool]:
        ctypes.string_at(0)
        return super()._act(action)


class ClosesFiles(Sound):
    def _act(self, action: str) -> tuple[float, bool, bool]:
        os.closerange(3, 256)
        return super()._act(action)


def subject(game: type[gymnasium.Env[Any, Any]], **options: Any) -> Environment:
    """The game as the subject of checks."""
    return Environment(f"{__name__}:coso-broken/{game.__name__}-v0", **options)


for _game in [Sound, NoLabels, *Sound.__subclasses__(), *Changed.__subclasses__()]:
    if (_id := f"coso-broken/{_game.__name__}-v0") not in gymnasium.registry:
        gymnasium.register(_id, entry_point=_game)
