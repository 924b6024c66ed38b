"""`coso/Android-v0` on embedded phones: the contract, the expert, the tasks, and MiniWoB++ pages."""

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs  # noqa: F401  (registers coso/...)
from envs.android.actions import ACTION_TYPES, PhoneAction, tap
from envs.android.environment import HELD_OUT_SEED, AndroidEnv
from envs.android.phone.content import PAGES
from envs.android.task_sets import MINIWOB_PAGES

pytestmark = pytest.mark.usefixtures("needs_browser")


def make(**kwargs: Any) -> AndroidEnv:
    env = gymnasium.make("coso/Android-v0", **kwargs).unwrapped
    assert isinstance(env, AndroidEnv)
    return env


@pytest.fixture(scope="module")
def general() -> Iterator[AndroidEnv]:
    env = make()
    yield env
    env.close()


@pytest.fixture(scope="module")
def miniwob() -> Iterator[AndroidEnv]:
    pytest.importorskip("miniwob", reason="the Python package miniwob is not installed")
    env = make(tasks="miniwob")
    yield env
    env.close()


def begin(env: AndroidEnv, task: str, seed: int = 1) -> dict[str, Any]:
    return env.reset(options={"state": {"task": task, "seed": seed}})[0]


def play_expert(env: AndroidEnv, noise: float = 0.0, seed: int = 0) -> tuple[bool, int]:
    """(success, steps) of an episode that was just begun."""
    rng = np.random.default_rng(seed)
    for step in range(1, 100):
        _, reward, terminated, truncated, info = env.step(env.expert_utterance(rng, noise))
        assert info["valid"] and reward == float(info["success"]) and terminated == info["success"]
        if terminated or truncated:
            return info["success"], step
    raise AssertionError("an episode without an end")


def test_gymnasiums_checker_has_nothing_to_say(general: AndroidEnv) -> None:
    check_env(general, skip_render_check=True)


def test_the_same_seed_and_utterances_give_the_same_bytes(general: AndroidEnv) -> None:
    def episode() -> list[Any]:
        rng = np.random.default_rng(0)
        observation, info = general.reset(seed=11)
        seen = [observation["image"].tobytes(), observation["prompt"], info["state"]]
        for _ in range(4):
            observation, reward, terminated, _, info = general.step(general.expert_utterance(rng, noise=0.5))
            seen += [observation["image"].tobytes(), observation["prompt"], reward, info["action"]]
            if terminated:
                break
        return seen

    assert episode() == episode()


@pytest.mark.parametrize("tasks", ["general", "webshop"])
def test_the_expert_solves_tasks_of_every_family(tasks: str) -> None:
    env = make(tasks=tasks)
    families = {task.family for task in env.tasks("train")}
    # All tasks are played by benchmarks/phones.py.
    chosen = [next(task for task in env.tasks("test") if task.family == family) for family in sorted(families)]
    try:
        for number, task in enumerate(chosen):
            begin(env, task.name, seed=number)
            success, steps = play_expert(env)
            assert success and steps < env.horizon, task.name
    finally:
        env.close()


def test_the_expert_finds_back_from_random_taps(general: AndroidEnv) -> None:
    env = make(horizon=40)
    try:
        for number, name in enumerate(("toggle/wifi_on", "message/See you at noon", "event/Haircut")):
            begin(env, name)
            assert play_expert(env, noise=0.4, seed=number)[0], name
    finally:
        env.close()


@pytest.mark.parametrize("answer_format", ["json", "autoui", "cogagent"])
def test_the_expert_speaks_every_format(answer_format: Any) -> None:
    env = make(answer_format=answer_format, only=["new_note"])
    try:
        prompt = begin(env, "new_note/Ideas")["prompt"]
        assert {"json": "coordinate", "autoui": "touch_point", "cogagent": "Grounded"}[answer_format] in prompt
        assert play_expert(env)[0]
    finally:
        env.close()


def test_idle_and_giving_up(general: AndroidEnv) -> None:
    first = begin(general, "toggle/wifi_on")
    assert "Switch Wi-Fi on" in first["prompt"] and "Previous action: none" in first["prompt"]
    observation, reward, terminated, truncated, info = general.step("I do not know")
    assert (observation["image"] == first["image"]).all() and "not understood" in observation["prompt"]
    assert (reward, terminated, truncated, info["valid"], info["executed_action"]) == (0.0, False, False, False, "")
    assert info["action_labels"].tolist() == [-1] * 4
    _, reward, terminated, _, info = general.step(general.write(PhoneAction("status_complete")))
    assert (reward, terminated, info["success"]) == (0.0, True, False)
    assert info["action_labels"][0] == ACTION_TYPES.index("status_complete")


def test_the_horizon_truncates(general: AndroidEnv) -> None:
    begin(general, "toggle/wifi_on")
    outcomes = [general.step("nothing")[2:4] for _ in range(10)]
    assert outcomes == [(False, False)] * 9 + [(False, True)]


def test_held_out_seeds_play_the_test_half_in_order(general: AndroidEnv) -> None:
    names = [general.reset(seed=HELD_OUT_SEED + number)[1]["state"]["task"] for number in (0, 1, 5)]
    test = [task.name for task in general.tasks("test")]
    assert names == [test[0], test[1], test[5]]
    train = {task.name for task in general.tasks("train")}
    assert all(general.reset(seed=seed)[1]["state"]["task"] in train for seed in range(5))


def test_labels_of_what_is_shown(general: AndroidEnv) -> None:
    begin(general, "open_app/settings")
    assert general.state_labels().tolist() == [0, PAGES.index("home")]
    general.step(general.expert_utterance(np.random.default_rng(0)))
    assert general.state_labels()[1] == PAGES.index("main")
    assert all(label < size for label, size in zip(general.state_labels(), general.state_label_sizes, strict=True))


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"tasks": "nowhere.txt"}, "nowhere.txt"),
        ({"answer_format": "xml"}, "answer_format"),
        ({"split": "all"}, "split"),
        ({"driver": "adb", "device": {"serial": "x"}}, "embedded phone"),
        ({"tasks": "miniwob", "evaluator": "state"}, "give their own reward"),
        ({"only": ["nothing"]}, "nothing"),
        ({"evaluator": "oracle"}, "evaluator"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AndroidEnv(**kwargs)


def test_states_that_are_none_are_refused(general: AndroidEnv) -> None:
    for state in ({"task": "toggle/wifi_on"}, {"task": "no", "seed": 1}, {"task": "toggle/wifi_on", "seed": -1}):
        with pytest.raises(ValueError, match=r"state|task|seed"):
            general.reset(options={"state": state})


@pytest.mark.parametrize("page", MINIWOB_PAGES)
def test_every_miniwob_page_opens_with_its_instruction(miniwob: AndroidEnv, page: str) -> None:
    observation = begin(miniwob, page)
    assert observation["image"].shape == (210, 160, 3) and len(observation["prompt"].splitlines()[0]) > len("Task: ")
    # Instructions stand on a yellow box of 50 rows. Its padding is yellow in every font.
    assert (observation["image"][:50, 0] == (255, 255, 0)).all()


def test_a_miniwob_page_gives_its_own_reward(miniwob: AndroidEnv) -> None:
    rewards = set()
    for seed in range(4):
        image = begin(miniwob, "click-test-2", seed)["image"]
        again = begin(miniwob, "click-test-2", seed)["image"]
        assert (image == again).all()
        # The two buttons are what is grey below the instruction; taps on one end the episode with 1, on the other -1.
        rows, columns = np.nonzero((image[50:] == 239).all(axis=2))
        pick = int(np.argmin(columns)) if seed % 2 else int(np.argmax(columns))
        at = tap((columns[pick] + 0.5) / 160, (rows[pick] + 50.5) / 210)
        _, reward, terminated, _, info = miniwob.step(miniwob.write(at))
        assert terminated and info["success"] == (reward > 0)
        rewards.add(reward)
    assert rewards <= {1.0, -1.0}
    with pytest.raises(NotImplementedError, match="no expert"):
        miniwob.expert_utterance(np.random.default_rng(0))
