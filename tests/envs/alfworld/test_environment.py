"""`coso/ALFWorld-v0`: rewards, ends, modes, states, utterances of any kind, and game files that cannot be played."""

import asyncio
import json
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import envs  # noqa: F401  (registers coso/...)
from actors.images import decode_png
from actors.rollouts.environment_host import EnvironmentHost
from envs.alfworld.environment import ALFWorld
from envs.alfworld.games import DATA_FOLDER, GAME_FILE, TRAJECTORY_FILE, NoGames
from envs.alfworld.names import TASKS
from envs.alfworld.picture import blank_picture
from envs.settings import EnvironmentSettings

ENV_ID = "coso/ALFWorld-v0"


def answer(command: str) -> str:
    return json.dumps({"thoughts": "open, then look", "action": command})


@pytest.fixture(scope="module")
def env(games_folder: Path) -> ALFWorld:
    return ALFWorld(games=str(games_folder))


def at(env: ALFWorld, task: str, commands: int = 0) -> list[str]:
    """Begin the game of a task after some commands of its solution, and return the others."""
    path = next(path for path in env._games if path.task == task)
    file = path.folder / DATA_FOLDER / path.name / GAME_FILE
    solution = json.loads(file.read_text())["walkthrough"]
    env.reset(seed=0, options={"state": {"game": path.name, "commands": solution[:commands]}})
    return solution[commands:]


@pytest.mark.parametrize("kwargs", [{}, {"mode": "image", "invalid_action": "random"}, {"mode": "text", "history": 2}])
def test_gymnasium_finds_no_fault(games_folder: Path, kwargs: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = gymnasium.make(ENV_ID, games=str(games_folder), render_mode="rgb_array", **kwargs)
        check_env(made.unwrapped)
        made.close()


@pytest.mark.parametrize("task", TASKS)
def test_the_solution_is_rewarded_as_published(env: ALFWorld, task: str) -> None:
    solution = at(env, task)
    for step, command in enumerate(solution, 1):
        observation, reward, terminated, truncated, info = env.step(answer(command))
        last = step == len(solution)
        assert reward == 50 * last + info["goal_condition_rate"]
        assert terminated is last is info["success"] and not truncated
        assert info["action"] == info["executed_action"] == command and info["valid"]
        assert (info["goal_condition_rate"] == 1) is last and info["task"] == task
        assert observation["image"].shape == (300, 300, 3)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(answer("look"))


def test_no_admissible_command_costs_one_and_does_nothing(env: ALFWorld) -> None:
    at(env, "pick_two_obj_and_place")
    before = env.state
    for utterance in ("", "fly", answer("open moon 1"), answer("")):
        _, reward, terminated, _, info = env.step(utterance)
        assert reward == info["goal_condition_rate"] - 1 and not terminated
        assert (info["action"], info["executed_action"], info["valid"]) == ("", "", False)
        assert info["action_labels"].tolist() == [-1] * 5
        assert env.state == before and "Nothing happens." in env.prompt


@pytest.mark.parametrize(("policy", "reward"), [("noop", 0.0), ("random", None)])
def test_the_other_policies_for_invalid_utterances(games_folder: Path, policy: Any, reward: float | None) -> None:
    env = ALFWorld(games=str(games_folder), invalid_action=policy)
    _, info = env.reset(seed=1)
    _, got, _, _, after = env.step("fly")
    if reward is None:
        assert after["executed_action"] in info["admissible_commands"] and not after["valid"]
    else:
        assert got == reward and after["executed_action"] == ""


def test_truncated_at_the_horizon(games_folder: Path) -> None:
    env = ALFWorld(games=str(games_folder), horizon=3)
    env.reset(seed=0)
    ends = [env.step("fly")[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    assert ALFWorld(games=str(games_folder)).horizon == 50


@settings(max_examples=60, deadline=None)
@given(st.text(), st.booleans())
def test_any_utterance_is_an_outcome(games_folder: Path, utterance: str, marked: bool) -> None:
    env = _shared(games_folder)
    if env._episode_over:
        env.reset(seed=3)
    observation, reward, _, _, info = env.step(f'"action": {utterance}' if marked else utterance)
    assert info["valid"] is bool(info["action"]) and -1 <= reward <= 51
    assert env.observation_space.contains(observation)


_SHARED: dict[Path, ALFWorld] = {}


def _shared(games_folder: Path) -> ALFWorld:
    if games_folder not in _SHARED:
        _SHARED[games_folder] = ALFWorld(games=str(games_folder))
    return _SHARED[games_folder]


def test_same_seed_same_bytes(env: ALFWorld) -> None:
    def play() -> list[Any]:
        rng = np.random.default_rng(5)
        observation, _ = env.reset(seed=42)
        seen: list[Any] = [observation["prompt"], observation["image"].tobytes()]
        for _ in range(6):
            observation, reward, *_ = env.step(answer(env.random_action(rng)))
            seen += [observation["prompt"], observation["image"].tobytes(), reward]
        return seen

    assert play() == play()


def test_seeds_draw_different_games(env: ALFWorld) -> None:
    assert len({env.reset(seed=seed)[1]["state"]["game"] for seed in range(30)}) == 6


def test_a_state_begins_where_it_was_taken(env: ALFWorld) -> None:
    rest = at(env, "pick_heat_then_place_in_recep", commands=4)
    state, prompt = env.state, env.prompt
    env.step(answer(rest[0]))
    observation, info = env.reset(options={"state": state})
    assert observation["prompt"] == prompt and info["state"] == state
    for command in rest:
        *_, info = env.step(answer(command))
    assert info["success"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"game": "train/none/trial", "commands": []}, "no game"),
        ({"game": 0}, "'game'"),
        ({"game": "", "commands": "look"}, "'commands'"),
    ],
)
def test_a_state_of_no_game_is_refused(env: ALFWorld, state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        env.reset(options={"state": state})


def test_a_state_that_cannot_be_reached_is_refused(env: ALFWorld) -> None:
    name = env._games[0].name
    with pytest.raises(ValueError, match="not admissible"):
        env.reset(options={"state": {"game": name, "commands": ["open moon 1"]}})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "test"}, "split must be of train"),
        ({"mode": "smell"}, "mode"),
        ({"tasks": ["cook"]}, "tasks"),
        ({"tasks": "pick_and_place_simple"}, "a list"),
        ({"rooms": ["attic"]}, "rooms"),
        ({"expert": "me"}, "expert"),
        ({"backend": "unity"}, "backend"),
        ({"horizon": 0}, "horizon"),
        ({"history": -1}, "history"),
        ({"floor_plans": [119]}, "no ALFWorld games of FloorPlan119"),
        ({"games": "nowhere"}, "coso alfworld make nowhere"),
    ],
)
def test_wrong_arguments_are_told(games_folder: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALFWorld(**{"games": str(games_folder), **kwargs})


def test_modes_show_what_they_say(games_folder: Path) -> None:
    shown = {}
    for mode in ("text+image", "text", "image"):
        env = ALFWorld(games=str(games_folder), mode=mode, history=2)  # type: ignore[arg-type]
        rest = at(env, "pick_cool_then_place_in_recep", commands=3)
        observation, *_ = env.step(answer(rest[0]))
        shown[mode] = observation
        assert f"Your last actions: {env.state['commands'][-2]}; {rest[0]}." in observation["prompt"]
        assert "Your task is to: " in observation["prompt"] and "go to fridge 1" in observation["prompt"]
    assert "What you see: You " in shown["text"]["prompt"]
    assert shown["text"]["prompt"] == shown["text+image"]["prompt"]
    assert "What you see" not in shown["image"]["prompt"]
    assert np.array_equal(shown["text"]["image"], blank_picture())
    assert np.array_equal(shown["image"]["image"], shown["text+image"]["image"])


def test_parsing_knows_the_state_and_before_one_the_grammar(games_folder: Path) -> None:
    env = ALFWorld(games=str(games_folder))
    assert env.parse(answer("open moon 3")).action == "open moon 3"
    env.reset(seed=0)
    assert not env.parse(answer("open moon 3")).valid
    assert env.parse(answer("look")).action == "look"


def test_the_expert_wins_with_words_and_labels_that_say_what_is_seen(env: ALFWorld) -> None:
    rng = np.random.default_rng(0)
    for task in TASKS:
        at(env, task)
        terminated = truncated = False
        while not (terminated or truncated):
            said = json.loads(env.expert_utterance(rng))
            assert said["thoughts"] and said["action"] in env._state.admissible
            labels = env.state_labels()
            assert labels.dtype == np.int32 and len(labels) == len(env.state_label_names)
            assert ((labels >= 0) & (labels < env.state_label_sizes)).all()
            assert bool(labels[2] > 0) is any(fact[0] == "holds" for fact in env._state.facts)
            *_, terminated, truncated, info = env.step(json.dumps(said))
        assert info["success"], task


def test_a_noisy_expert_says_habits_and_random_commands(env: ALFWorld) -> None:
    at(env, "pick_and_place_simple")
    rng = np.random.default_rng(0)
    assert json.loads(env.expert_utterance(rng, 1.0, "inventory"))["action"] == "inventory"
    drawn = {json.loads(env.expert_utterance(rng, 1.0))["action"] for _ in range(20)}
    assert len(drawn) > 3 and drawn <= set(env._state.admissible)
    assert json.loads(env.expert_utterance(rng, 1.0, "use moon 1"))["action"] in env._state.admissible


def test_the_planner_is_an_expert_too(games_folder: Path) -> None:
    env = ALFWorld(games=str(games_folder), expert="planner", tasks=["look_at_obj_in_light"])
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(8):
        *_, terminated, _, info = env.step(env.expert_utterance(rng))
        if terminated:
            break
    assert info["success"]


@pytest.fixture
def troubled_folder(games_folder: Path, tmp_path: Path) -> Path:
    """A copy of which four games are broken, each in another way."""
    folder = tmp_path / "troubled"
    shutil.copytree(games_folder, folder)
    broken = sorted((folder / DATA_FOLDER / "train").glob("*/*"))
    (broken[0] / GAME_FILE).write_text("{ no json")
    (broken[1] / GAME_FILE).unlink()
    unsolvable = json.loads((broken[2] / GAME_FILE).read_text()) | {"solvable": False}
    (broken[2] / GAME_FILE).write_text(json.dumps(unsolvable))
    no_pddl = json.loads((broken[3] / GAME_FILE).read_text()) | {"pddl_problem": "(define"}
    (broken[3] / GAME_FILE).write_text(json.dumps(no_pddl))
    return folder


def test_bad_games_are_named_skipped_and_counted(troubled_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    env = ALFWorld(games=str(troubled_folder))
    with caplog.at_level(logging.WARNING):
        played = [env.reset(seed=seed)[1] for seed in range(25)]
    assert len({info["state"]["game"] for info in played}) == 2
    assert played[-1]["skipped_games"] == 4
    named = [record.getMessage() for record in caplog.records if "skipping ALFWorld game" in record.getMessage()]
    assert len(named) == 4  # each once
    for reason in ("not JSON", "No such file", "unsolvable", "cannot be read"):
        assert any(reason in message for message in named), reason
    *_, info = env.step(answer("look"))
    assert info["skipped_games"] == 4


def test_nothing_but_bad_games_is_an_error(troubled_folder: Path) -> None:
    for file in troubled_folder.rglob(TRAJECTORY_FILE):
        file.write_text("[]")
    with pytest.raises(NoGames, match="none of the 6 games"):
        ALFWorld(games=str(troubled_folder)).reset(seed=0)


def test_it_runs_in_a_process_behind_a_deadline(games_folder: Path) -> None:
    async def play() -> tuple[dict[str, Any], dict[str, Any]]:
        host = EnvironmentHost(EnvironmentSettings(id=ENV_ID, kwargs={"games": str(games_folder)}, deadline_s=60.0))
        await host.start()
        try:
            observation, _ = await host.reset(seed=4)
            assert host.label_space.heads[0].name == "verb"
            await host.step(answer("look"))
            *_, info = await host.step("fly")
            return observation, info
        finally:
            await host.close()

    observation, info = asyncio.run(play())
    here = ALFWorld(games=str(games_folder))
    there, _ = here.reset(seed=4)
    assert there["prompt"] == observation["prompt"] and np.array_equal(
        there["image"], np.asarray(decode_png(observation["image"].png))
    )
    assert info["valid"] is False


def test_ai2_thor_says_what_it_needs(games_folder: Path) -> None:
    with pytest.raises(ImportError, match="AI2-THOR"):
        ALFWorld(games=str(games_folder), backend="thor")


_WITHOUT_THE_EXTRA = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("alfworld", "textworld", "fast_downward", "jericho", "tatsu"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
import envs.alfworld.building
from envs.alfworld.environment import ALFWorld
from envs.alfworld.engine import EngineMissing
assert not {"torch", "ray", "vllm"} & set(sys.modules)
try:
    ALFWorld(games=sys.argv[1])
except EngineMissing as error:
    print(error)
"""


def test_without_the_extra_everything_imports_and_says_how_to_get_it(games_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_THE_EXTRA, str(games_folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "make setup EXTRAS=alfworld" in done.stdout
