"""A model as a player: it answers what its processor and weights say, the same whenever it is greedy."""

from pathlib import Path

import pytest

from cluster.errors import CosoError
from cluster.play.model_player import ModelPlayer
from tests.tiny_models import PROMPT, make_idefics3, picture


def test_a_model_plays(tmp_path: Path) -> None:
    make_idefics3(tmp_path)
    observation = {"image": picture(), "prompt": PROMPT}
    greedy = [ModelPlayer(str(tmp_path), 0.0, seed, max_new_tokens=8).answer(observation) for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    sampled = [ModelPlayer(str(tmp_path), 1.0, seed, max_new_tokens=8).answer(observation) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CosoError, match=str(tmp_path)):
        ModelPlayer(str(tmp_path), 0.0, 1, max_new_tokens=8)
