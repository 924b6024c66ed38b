"""`coso play`: what is typed becomes an utterance, what happens is shown, and frames are kept."""

import io
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.text import Text

import envs  # noqa: F401  (registers coso/...)
from cluster.errors import CosoError
from cluster.play.session import PlayedEpisode, half_blocks, play

ENV_ID = "coso/NumberLine-v0"


def console() -> Console:
    return Console(file=io.StringIO(), width=80, color_system="truecolor", force_terminal=True)


def shown(screen: Console) -> str:
    plain = Console(file=io.StringIO(), width=80)
    assert isinstance(screen.file, io.StringIO)
    plain.print(Text.from_ansi(screen.file.getvalue()))
    assert isinstance(plain.file, io.StringIO)
    return plain.file.getvalue()


def types(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_the_expert_succeeds_and_every_frame_is_saved(tmp_path: Path) -> None:
    screen = console()
    frames = tmp_path / "new" / "frames"
    played = play(ENV_ID, seed=3, expert=True, episodes=3, frames_dir=frames, console=screen)
    assert len(played) == 3 and all(episode.success and episode.finished for episode in played)
    for number, episode in enumerate(played):
        saved = sorted(frames.glob(f"episode_{number:03d}_*.png"))
        assert len(saved) == episode.steps + 1
        expected, _ = gymnasium.make(ENV_ID).reset(seed=3 + number)
        assert np.array_equal(np.asarray(Image.open(saved[0])), expected["image"])
    text = shown(screen)
    assert text.count("The picture shows a target number") == 1
    assert "3 of 3 finished episodes succeeded" in text
    assert "▀" in text


def test_a_bare_action_word_a_whole_utterance_and_nonsense_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    types(monkeypatch, " + ", '{"thoughts": "back", "action": "-"}', "hello", "q")
    screen = console()
    # Seed 3 starts at 0 with target 4.
    (played,) = play(ENV_ID, {"invalid_action": "noop"}, seed=3, console=screen)
    assert played == PlayedEpisode(steps=3, total_reward=-1.0, success=False, finished=False)
    text = shown(screen)
    assert "step 1: +   reward +0" in text
    assert "step 2: -   reward -1" in text
    assert "step 3: not understood, executed instead: nothing" in text


def test_by_hand_to_the_target_then_the_end_of_the_input_quits(monkeypatch: pytest.MonkeyPatch) -> None:
    types(monkeypatch, "+", "+", "+", "+")
    won, left = play(ENV_ID, seed=3, episodes=5, console=console())
    assert won == PlayedEpisode(steps=4, total_reward=1.0, success=True, finished=True)
    assert left.steps == 0 and not left.finished


def test_noise_repeats_with_the_seed_and_max_steps_ends_an_episode() -> None:
    def rewards() -> list[PlayedEpisode]:
        return play(ENV_ID, seed=1, expert=True, noise=1.0, episodes=4, max_steps=3, console=console())

    played = rewards()
    assert played == rewards()
    assert len(played) == 4 and max(episode.steps for episode in played) == 3


@pytest.mark.parametrize(
    ("env_id", "kwargs", "words"),
    [
        ("coso/NumberLin-v0", {}, r"did you mean coso/NumberLine-v0\?"),
        ("nothing like it", {}, "no environment 'nothing like it'"),
        ("no_such_module:coso/X-v0", {}, "no_such_module"),
        (ENV_ID, {"max_pos": 3}, "max_pos"),
        (ENV_ID, {"max_position": 1}, "at least 2"),
        ("CartPole-v1", {}, "does not take utterances"),
    ],
)
def test_what_cannot_be_played_is_said_in_one_message(env_id: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(CosoError, match=words):
        play(env_id, kwargs, console=console())


def test_a_frames_folder_that_cannot_be_is_said_before_playing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CosoError, match="frames cannot be saved"):
        play(ENV_ID, expert=True, frames_dir=tmp_path / "file" / "frames", console=console())


def test_half_blocks_show_the_mean_colour_of_the_pixels_they_cover() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2] = (255, 0, 0)
    image[2:, 2:] = (0, 0, 255)
    left, right, _ = half_blocks(image, 2).segments
    assert left.style and left.style.color and left.style.bgcolor and right.style and right.style.bgcolor
    assert left.style.color.triplet == (255, 0, 0) and left.style.bgcolor.triplet == (0, 0, 0)
    assert right.style.bgcolor.triplet == (0, 0, 255)
    lines = list(half_blocks(np.zeros((300, 300, 3), np.uint8), 80).segments)
    assert len(lines) == 40 * 81


def test_a_phone_that_cannot_be_had_is_said_in_one_line() -> None:
    with pytest.raises(CosoError, match="none was found|there is no program at 'no-browser'"):
        play("coso/Android-v0", {"device": {"browser": "no-browser"}}, console=console())
