"""NumberLine to the letter: rules, start, horizon, invalid answers, picture, expert, seeding."""

import hashlib
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium
import matplotlib
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

import envs  # noqa: F401  (registers coso/...)
from envs.cards.number_line import NumberLine

ENV_ID = "coso/NumberLine-v0"


def answer(action: str) -> str:
    return json.dumps({"thoughts": "", "action": action})


def at(current: int, target: int, **kwargs: Any) -> NumberLine:
    env = NumberLine(**kwargs)
    env.reset(seed=0, options={"state": {"current": current, "target": target}})
    return env


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        (ENV_ID, {}),
        (ENV_ID, {"max_position": 2, "invalid_action": "penalty"}),
        (ENV_ID, {"invalid_action": "noop"}),
        ("coso/SlowNumberLine-v0", {"mean_ms": 1.0}),
    ],
)
def test_gymnasium_finds_no_fault(env_id: str, kwargs: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(env_id, render_mode="rgb_array", **kwargs).unwrapped)


@pytest.mark.parametrize(
    ("current", "target", "action", "reached", "reward"),
    [
        (1, 3, "+", 2, 0.0),
        (1, 3, "-", 0, -1.0),
        (0, 3, "-", 0, -1.0),  # the end of the line: no move, no shrinking
        (4, 1, "-", 3, 0.0),
        (4, 1, "+", 5, -1.0),
        (5, 1, "+", 5, -1.0),
        (2, 3, "+", 3, 1.0),
        (1, 0, "-", 0, 1.0),
        (4, 5, "+", 5, 1.0),
    ],
)
def test_each_move_and_its_reward(current: int, target: int, action: str, reached: int, reward: float) -> None:
    observation, got, terminated, truncated, info = at(current, target).step(answer(action))
    assert got == reward and isinstance(got, float)
    assert terminated is (reached == target)
    assert truncated is False
    assert info["state"] == {"current": reached, "target": target}
    assert info["success"] is terminated
    assert (info["action"], info["executed_action"], info["valid"]) == (action, action, True)
    assert info["action_labels"].tolist() == ["-+".index(action)]
    assert info["action_labels"].dtype == np.int32


@pytest.mark.parametrize("max_position", [2, 5, 9])
def test_truncated_after_twice_the_maximum(max_position: int) -> None:
    env = at(0, max_position, max_position=max_position)
    for step in range(1, 2 * max_position + 1):
        _, _, terminated, truncated, info = env.step(answer("-"))
        assert not terminated and not info["success"]
        assert truncated is (step == 2 * max_position == env.horizon)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(answer("-"))


def test_reaching_the_target_on_the_last_step_is_no_truncation() -> None:
    env = at(0, 2, max_position=2)
    for action in "--+":
        env.step(answer(action))
    _, reward, terminated, truncated, _ = env.step(answer("+"))
    assert (reward, terminated, truncated) == (1.0, True, False)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(answer("+"))


@pytest.mark.parametrize(("policy", "reward"), [("penalty", -1.0), ("noop", 0.0)])
def test_an_invalid_answer_moves_nothing_under_penalty_and_noop(policy: str, reward: float) -> None:
    env = at(1, 2, invalid_action=policy)
    _, got, terminated, _, info = env.step("I should add")
    assert (got, terminated) == (reward, False)
    assert info["state"] == {"current": 1, "target": 2}
    assert (info["action"], info["executed_action"], info["valid"]) == ("", "", False)
    assert info["action_labels"].tolist() == [-1]
    for _ in range(9):
        _, _, _, truncated, _ = env.step("I should add")
    assert truncated


def test_an_invalid_answer_does_a_random_action_under_random() -> None:
    drawn: Counter[str] = Counter()
    env = NumberLine()
    env.reset(seed=0)
    for _ in range(400):
        env.reset(options={"state": {"current": 1, "target": 4}})
        _, reward, _, _, info = env.step('"action": "+ or -"')
        assert (info["action"], info["valid"], info["action_labels"].tolist()) == ("", False, [-1])
        moved = info["state"]["current"] - 1
        assert (info["executed_action"], reward) == (("+", 0.0) if moved == 1 else ("-", -1.0))
        drawn[info["executed_action"]] += 1
    # 4 standard deviations of a fair coin
    assert abs(drawn["+"] - 200) < 40


def test_start_is_uniform_with_equal_numbers_moved_apart() -> None:
    """Each (target, current) has probability 1/36; an equal pair's goes to ((target + 1) mod 5, current)."""
    expected: Counter[tuple[int, int]] = Counter()
    for target in range(6):
        for current in range(6):
            expected[(target + 1) % 5 if target == current else target, current] += 1
    env = NumberLine()
    env.reset(seed=1)
    draws = 3600
    seen: Counter[tuple[int, int]] = Counter()
    for _ in range(draws):
        _, info = env.reset()
        seen[info["state"]["target"], info["state"]["current"]] += 1
    assert set(seen) == set(expected)
    for pair, weight in expected.items():
        mean = draws * weight / 36
        assert abs(seen[pair] - mean) < 5 * mean**0.5, pair


def episode_digest(seed: int, utterances: list[str]) -> str:
    env = gymnasium.make(ENV_ID, disable_env_checker=True)
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        for part in parts:
            digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())

    observation, info = env.reset(seed=seed)
    add(observation["image"], observation["prompt"], info)
    for utterance in utterances:
        observation, reward, terminated, truncated, info = env.step(utterance)
        add(observation["image"], observation["prompt"], reward, terminated, truncated, info)
        if terminated or truncated:
            observation, info = env.reset()
            add(observation["image"], info)
    return digest.hexdigest()


@given(st.integers(0, 2**32), st.lists(st.one_of(st.text(st.characters()), st.sampled_from("+-").map(answer))))
@settings(max_examples=50, deadline=None)
def test_same_seed_and_utterances_give_the_same_bytes(seed: int, utterances: list[str]) -> None:
    np.random.seed(1)
    first = episode_digest(seed, utterances)
    np.random.seed(2)
    assert episode_digest(seed, utterances) == first


def test_another_process_gives_the_same_bytes() -> None:
    script = (
        "from tests.envs.cards.test_number_line import episode_digest; "
        "print(episode_digest(7, ['?'] * 30 + ['\"action\":+']))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == episode_digest(7, ["?"] * 30 + ['"action":+'])
    assert done.stdout.strip() != episode_digest(8, ["?"] * 30 + ['"action":+'])


@given(st.text(st.characters()))
@settings(deadline=None)
def test_any_utterance_is_in_the_action_space_and_steps(utterance: str) -> None:
    env = gymnasium.make(ENV_ID)
    env.reset(seed=0)
    assert env.action_space.contains(utterance)
    observation, *_ = env.step(utterance)
    assert env.observation_space.contains(observation)


def test_only_strings_are_utterances() -> None:
    with pytest.raises(TypeError, match="utterance"):
        at(1, 2).step(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_position", [5, 12])
def test_the_picture_shows_the_state_as_drawn_directly(max_position: int) -> None:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    font = ImageFont.truetype(str(path), 36, layout_engine=ImageFont.Layout.BASIC)
    env = NumberLine(max_position=max_position, render_mode="rgb_array")
    for current in range(max_position + 1):
        target = max_position - current
        if target == current:
            continue
        canvas = Image.new("RGB", (300, 300), "white")
        draw = ImageDraw.Draw(canvas)
        draw.text((30, 60), f"Target: {target}", font=font, fill="black")
        draw.text((30, 180), f"Current: {current}", font=font, fill="black")
        observation, _ = env.reset(options={"state": {"current": current, "target": target}})
        assert np.array_equal(observation["image"], np.asarray(canvas))
        rendered = env.render()
        assert rendered is not None and np.array_equal(rendered, observation["image"])
        # Whoever holds a picture may write on it.
        observation["image"][:] = 0
        assert np.array_equal(env.render(), np.asarray(canvas))  # type: ignore[arg-type]


def test_the_prompt_is_short_and_states_rules_and_format() -> None:
    observation, _ = NumberLine(max_position=7).reset(seed=0)
    prompt = observation["prompt"]
    assert len(prompt.split()) <= 60
    for part in ("0 to 7", '"+"', '"-"', '"current number"', '"target number"', '"thoughts"', '"action"'):
        assert part in prompt
    assert prompt.rindex('"action"') > prompt.rindex('"thoughts"')


@pytest.mark.parametrize("max_position", [2, 5])
def test_the_expert_reaches_the_target_by_the_shortest_way_and_says_what_it_does(max_position: int) -> None:
    rng = np.random.default_rng(0)
    for current in range(max_position + 1):
        for target in set(range(max_position + 1)) - {current}:
            env = at(current, target, max_position=max_position)
            for step in range(abs(target - current)):
                utterance = env.expert_utterance(rng)
                said = json.loads(utterance)
                assert list(said) == ["current number", "target number", "thoughts", "action"]
                assert env.state_labels().tolist() == [
                    int(said["current number"]),
                    int(said["target number"]),
                ]
                assert env.parse(utterance).action == said["action"] == ("+" if target > current else "-")
                assert said["thoughts"].endswith("add" if target > current else "subtract")
                _, reward, terminated, _, _ = env.step(utterance)
                assert terminated is (step == abs(target - current) - 1)
                assert reward == float(terminated)


def test_expert_noise_is_the_share_of_random_actions_and_thoughts_agree_with_actions() -> None:
    env = at(1, 4)
    rng = np.random.default_rng(0)
    answers = [json.loads(env.expert_utterance(rng, noise=0.5)) for _ in range(2000)]
    for said in answers:
        assert said["thoughts"].endswith({"+": "add", "-": "subtract"}[said["action"]])
    wrong = sum(said["action"] == "-" for said in answers)
    # Half of half are wrong: 500, standard deviation 19.
    assert abs(wrong - 500) < 80
    assert all(json.loads(env.expert_utterance(rng))["action"] == "+" for _ in range(100))


def test_state_labels_fit_their_sizes_and_names() -> None:
    env = at(2, 5)
    assert env.state_label_names == ("current", "target")
    assert env.state_label_sizes == (6, 6)
    assert env.state_labels().dtype == np.int32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state": {"current": 1}}, "'current' and 'target'"),
        ({"state": {"current": 1, "target": 2, "steps": 3}}, "'current' and 'target'"),
        ({"state": {"current": 1, "target": 6}}, r"'target' must be an integer in 0\.\.5, not 6"),
        ({"state": {"current": -1, "target": 2}}, "'current'"),
        ({"state": {"current": "1", "target": 2}}, "'1'"),
        ({"state": {"current": True, "target": 2}}, "True"),
        ({"state": {"current": 2, "target": 2}}, "cannot start at its target"),
        ({"state": [1, 2]}, "must be a dict"),
        ({"stat": {"current": 1, "target": 2}}, "reset takes"),
    ],
)
def test_a_state_that_cannot_be_is_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NumberLine().reset(seed=0, options=options)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"max_position": 1}, "max_position"),
        ({"max_position": 2.5}, "max_position"),
        ({"invalid_action": "ignore"}, "random, penalty, noop"),
        ({"render_mode": "human"}, "render_mode"),
    ],
)
def test_bad_settings_are_refused_in_words(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NumberLine(**kwargs)


def test_importing_envs_needs_no_heavy_library() -> None:
    script = (
        "import sys, envs, gymnasium; gymnasium.make('coso/NumberLine-v0').reset(seed=0); "
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
