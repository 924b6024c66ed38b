"""Failed episodes are data until they are too many of the latest ones."""

from __future__ import annotations

import random

import pytest

from actors.rollouts.failed_episodes import EPISODE_WINDOW, FailedEpisodes, TooManyFailedEpisodes


def test_the_error_names_environment_reasons_and_the_latest_episode() -> None:
    episodes = FailedEpisodes("mine/Game-v0", 0.5)
    with pytest.raises(TooManyFailedEpisodes) as error:
        for number in range(EPISODE_WINDOW):
            reason = "prompt_too_long" if number < 2 else "image_refused"
            episodes.failed(f"7-0-{number}", reason, "an image of 3000 × 10")
    assert number == EPISODE_WINDOW - 1  # before that there is too little to tell
    assert str(error.value) == (
        "50 of the latest 50 episodes of mine/Game-v0 failed (image_refused 48, prompt_too_long 2); "
        "rollout.max_failed_episodes is 0.5. The latest is episode 7-0-49: an image of 3000 × 10"
    )


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.5, 1.0])
def test_it_ends_with_the_first_window_in_which_more_than_the_limit_failed(limit: float) -> None:
    rng = random.Random(1)
    episodes = FailedEpisodes("mine/Game-v0", limit)
    history: list[bool] = []
    for number in range(600):
        history.append(rng.random() < number / 600)
        latest = history[-EPISODE_WINDOW:]
        if history[-1] and len(latest) == EPISODE_WINDOW and sum(latest) / EPISODE_WINDOW > limit:
            with pytest.raises(TooManyFailedEpisodes):
                episodes.failed(str(number), "died", "")
            break
        if history[-1]:
            episodes.failed(str(number), "died", "")
        else:
            episodes.finished()
    assert (len(history) == 600) == (limit == 1.0)
