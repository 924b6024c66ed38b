"""`coso play`: play an environment in the terminal, by hand or with its expert, and save the pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.panel import Panel
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from cluster.environments import make_environment
from cluster.errors import CosoError
from envs.android.device import DeviceError
from envs.android.evaluators import EvaluatorError
from envs.base import TextActionEnv

if TYPE_CHECKING:
    from cluster.play.model_player import ModelPlayer
    from cluster.play.page import PlayPage

_QUIT = "q"
_MAX_PICTURE_COLUMNS = 100


@dataclass(frozen=True)
class PlayedEpisode:
    """The result of an episode; `finished` is False if the player quit or `max_steps` ended it."""

    steps: int
    total_reward: float
    success: bool
    finished: bool


def play(
    env_id: str,
    env_kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    expert: bool = False,
    noise: float = 0.0,
    episodes: int = 1,
    frames_dir: Path | None = None,
    max_steps: int | None = None,
    console: Console | None = None,
    player: ModelPlayer | None = None,
    page: PlayPage | None = None,
) -> list[PlayedEpisode]:
    """Play `episodes` episodes, seeded `seed`, `seed + 1`, …, showing each step in the terminal.

    By hand, each input line is an utterance, or an action word, which is put into a JSON answer; `q` or the end of
    the input quits. With `expert`, the environment's expert answers; with probability `noise` in [0, 1] it acts at
    random. With a `player`, a model answers. With a `page`, the page shows the screen and takes answers by hand.
    Frames are saved in `frames_dir` as `episode_EEE_step_SSS.png`. An episode has at most `max_steps` steps.

    Raises CosoError if the environment is unknown, cannot be made or fails, or if frames cannot be saved.
    """
    console = console or Console()
    if not 0 <= noise <= 1:
        raise CosoError(f"noise is a probability from 0 to 1, not {noise:g}")
    frames = _Frames(frames_dir)
    env = _make(env_id, env_kwargs or {})
    played: list[PlayedEpisode] = []
    try:
        for episode in range(episodes):
            observation, _ = env.reset(seed=seed + episode)
            if episode == 0:
                console.print(Panel(Text(observation["prompt"]), title=f"{env_id}: the agent's prompt"))
                if not expert and player is None and page is None:
                    console.print(_how_to_answer(env))
            console.rule(f"episode {episode + 1} of {episodes}, seed {seed + episode}")
            rng = np.random.default_rng((seed, episode)) if expert else None
            screen = _Screen(console, frames, page, episode)
            answer = _answers(_task(env), console, rng, noise, player, page)
            outcome = _play_episode(env, observation, answer, max_steps, console, screen)
            played.append(outcome)
            if not expert and player is None and not outcome.finished and outcome.steps != max_steps:
                break
    except (DeviceError, EvaluatorError) as error:
        raise CosoError(f"{env_id} failed: {error}") from error
    except NotImplementedError as error:
        raise CosoError(f"{env_id} cannot be played by an expert: {error}") from error
    finally:
        env.close()
    done = [episode for episode in played if episode.finished]
    if done:
        console.print(f"{sum(episode.success for episode in done)} of {len(done)} finished episodes succeeded")
    if frames_dir is not None:
        console.print(f"{frames.saved} frames saved in {frames_dir}")
    return played


Answer = Callable[[dict[str, Any]], str | None]
"""Observation -> utterance, or None to quit."""


def _answers(
    task: TextActionEnv,
    console: Console,
    rng: np.random.Generator | None,
    noise: float,
    player: ModelPlayer | None,
    page: PlayPage | None,
) -> Answer:
    """Who answers: the expert if `rng` is given, else the model if given, else the person (terminal or page)."""
    if rng is not None:
        return lambda observation: task.expert_utterance(rng, noise)
    if player is not None:
        return player.answer
    return lambda observation: _read_utterance(console, task, page)


class _Screen:
    """Shows an episode on the page or in the terminal, and saves its frames."""

    def __init__(self, console: Console, frames: _Frames, page: PlayPage | None, episode: int) -> None:
        self._console, self._frames, self._page, self._episode = console, frames, page, episode
        self._step = 0

    def show(self, observation: dict[str, Any], happened: str = "", over: bool = False) -> None:
        """Show the next screen; on a page also the step that led to it."""
        if self._page is not None:
            self._page.show(observation["image"], observation["prompt"], happened, over)
        else:
            _show(self._console, observation["image"])
        self._frames.save(observation["image"], self._episode, self._step)
        self._step += 1


def _play_episode(
    env: gymnasium.Env[Any, Any],
    observation: dict[str, Any],
    answer: Answer,
    max_steps: int | None,
    console: Console,
    screen: _Screen,
) -> PlayedEpisode:
    total_reward = 0.0
    step = 0
    screen.show(observation)
    while max_steps is None or step < max_steps:
        utterance = answer(observation)
        if utterance is None:
            break
        observation, reward, terminated, truncated, info = env.step(utterance)
        step += 1
        total_reward += float(reward)
        outcome = _outcome(step, info, float(reward), total_reward)
        screen.show(observation, f"{utterance}\n  {outcome.plain}", over=terminated or truncated)
        console.print(Text(utterance, style="dim"))
        console.print(outcome)
        if terminated or truncated:
            success = bool(info["success"])
            verdict = Text("success", style="bold green") if success else Text("no success", style="bold red")
            console.print(verdict, "" if terminated else "(step limit reached)")
            return PlayedEpisode(step, total_reward, success, finished=True)
    return PlayedEpisode(step, total_reward, success=False, finished=False)


def _make(env_id: str, env_kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    env = make_environment(env_id, env_kwargs)
    if not isinstance(env.unwrapped, TextActionEnv):
        env.close()
        raise CosoError(f"{env_id} does not take utterances: coso play needs an envs.base.TextActionEnv")
    return env


def _task(env: gymnasium.Env[Any, Any]) -> TextActionEnv:
    task = env.unwrapped
    assert isinstance(task, TextActionEnv)
    return task


def _how_to_answer(env: gymnasium.Env[Any, Any]) -> Text:
    short = _task(env).shorthand_help
    choice = f"{short} or a whole utterance" if short else "a whole utterance"
    return Text(f"Answer with {choice}; {_QUIT} quits.")


def _read_utterance(console: Console, task: TextActionEnv, page: PlayPage | None) -> str | None:
    """Read the next utterance from the terminal or the page; None to quit."""
    if page is not None:
        line = page.read()
    else:
        try:
            line = console.input("[bold]> [/bold]")
        except EOFError:
            return None
    if line.strip().lower() == _QUIT:
        return None
    return task.from_shorthand(line) or line


def _outcome(step: int, info: dict[str, Any], reward: float, total_reward: float) -> Text:
    text = Text(f"step {step}: ")
    if info["valid"]:
        text.append(info["action"], style="bold cyan")
    else:
        text.append("not understood", style="bold yellow")
        text.append(f", executed instead: {info['executed_action'] or 'nothing'}")
    return text.append(f"   reward {reward:+g}   total {total_reward:+g}")


def _show(console: Console, image: NDArray[np.uint8]) -> None:
    console.print(half_blocks(image, min(console.width, _MAX_PICTURE_COLUMNS)))


def half_blocks(image: NDArray[np.uint8], columns: int) -> Segments:
    """A picture uint8 (H, W, 3) as coloured half-block characters, `columns` wide: each shows two pixels."""
    height, width, _ = image.shape
    columns = max(1, min(columns, width))
    # A character is about twice as high as wide, so half blocks make square pixels.
    rows = max(1, round(height * columns / width / 2))
    pixels = np.asarray(Image.fromarray(image).resize((columns, 2 * rows), Image.Resampling.BOX))
    segments: list[Segment] = []
    for row in range(rows):
        segments.extend(_row_segments(pixels[2 * row], pixels[2 * row + 1]))
        segments.append(Segment.line())
    return Segments(segments)


def _row_segments(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> Iterable[Segment]:
    for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
        yield Segment("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))


class _Frames:
    """Saves the pictures of a session, if a folder is given."""

    def __init__(self, folder: Path | None) -> None:
        self.saved = 0
        self._folder = folder
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CosoError(f"frames cannot be saved in {folder}: {error.strerror or error}") from error

    def save(self, image: NDArray[np.uint8], episode: int, step: int) -> None:
        """Save a picture uint8 (H, W, 3) as PNG, named by episode and step."""
        if self._folder is None:
            return
        path = self._folder / f"episode_{episode:03d}_step_{step:03d}.png"
        try:
            Image.fromarray(image).save(path)
        except OSError as error:
            raise CosoError(f"{path} cannot be saved: {error.strerror or error}") from error
        self.saved += 1
