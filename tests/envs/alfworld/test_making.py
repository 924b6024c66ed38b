"""Made games: fixed by their seed, of the right split, room and task, and solved by the expert."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from envs.alfworld.building import as_game_file, build_game, check_game
from envs.alfworld.engine import Engine
from envs.alfworld.expert import Expert, play_expert, thought
from envs.alfworld.games import DATA_FOLDER, GAME_FILE, GameFile, NoGames, list_games, read_game
from envs.alfworld.games import games_folder as games_folder_of
from envs.alfworld.making import CannotBeMade, GameRequest, make_game, requests
from envs.alfworld.names import FLOOR_PLANS, ROOMS, TASK_ROOMS, TASKS, UNSEEN_FLOOR_PLANS, room_of
from envs.alfworld.scene import scene_of


def test_splits_share_no_room_and_cover_every_floor_plan_and_task() -> None:
    wanted = {split: list(requests(split, 1, 0)) for split in ("train", "seen", "unseen")}
    plans = {split: {request.floor_plan for request in some} for split, some in wanted.items()}
    assert plans["train"] == plans["seen"] == set(FLOOR_PLANS) - UNSEEN_FLOOR_PLANS
    assert plans["unseen"] == UNSEEN_FLOOR_PLANS and len(FLOOR_PLANS) == 120
    assert {10, 219, 308, 424} <= UNSEEN_FLOOR_PLANS  # the published valid_unseen
    for some in wanted.values():
        assert {request.task for request in some} == set(TASKS)
        assert {room_of(request.floor_plan) for request in some} == set(ROOMS)
        assert all(room_of(request.floor_plan) in TASK_ROOMS[request.task] for request in some)


def test_a_request_is_always_the_same_game_and_others_are_others() -> None:
    request = GameRequest("train", 5, "pick_and_place_simple", 0, seed=3)
    assert make_game(request) == make_game(request)
    others = [replace(request, index=1), replace(request, seed=4), replace(request, split="seen"),
              replace(request, attempt=1)]  # fmt: skip
    assert len({make_game(each).game["pddl_problem"] for each in [request, *others]}) == 5


def test_a_request_for_one_kind_of_object_and_receptacle_gets_it() -> None:
    for request in requests("train", 2, 0, ["pick_and_place_simple"], [406, 412], "SoapBar", "Toilet"):
        names = make_game(request).trajectory["pddl_params"]
        assert (names["object_target"], names["parent_target"]) == ("SoapBar", "Toilet")
    with pytest.raises(CannotBeMade):
        make_game(GameRequest("train", 406, "pick_and_place_simple", 0, 0, target="Laptop"))


def test_nearly_every_floor_plan_and_task_can_be_made() -> None:
    """A few rooms lack what a task needs (a lamp, something to clean); games of them are refused, not faulty."""
    outcomes = Counter[str]()
    for request in requests("train", 1, 5):
        try:
            made = make_game(request)
        except CannotBeMade:
            outcomes["refused"] += 1
            continue
        outcomes["made"] += 1
        assert made.name.startswith(request.task) and made.name.endswith(f"-{request.floor_plan}")
        # What the goal names is there, and not at its goal already.
        goal = as_game_file(made).goal
        objects = made.trajectory["pddl_params"]["object_target"]
        wanted = 2 if request.task == "pick_two_obj_and_place" else 1
        assert made.game["pddl_problem"].count(f"(objectType {objects}_bar_") >= wanted
        assert goal.target in made.game["grammar"]
    assert outcomes["made"] > 0.9 * outcomes.total()


def test_what_is_built_is_solved_by_the_expert_again(games_folder: Path) -> None:
    for split in ("train", "seen", "unseen"):
        for path in list_games(games_folder, split):
            game = read_game(path)
            outcome = check_game(path, horizon=50)
            assert outcome.problem == "" and outcome.steps == len(game.game["walkthrough"]) <= 50


def test_what_the_expert_cannot_solve_in_time_is_made_again_or_reported(tmp_path: Path) -> None:
    outcome = build_game(GameRequest("train", 305, "pick_two_obj_and_place", 0, 1), tmp_path, horizon=3)
    assert outcome.steps is None and len(outcome.unsolved) == 5 and "expert" in outcome.problem
    assert not list(tmp_path.rglob(GAME_FILE))


def test_the_expert_puts_both_things_down(games: list[GameFile]) -> None:
    """It was written for the verb `put`, and with `move` would never learn that its hands are empty."""
    game = next(game for game in games if game.goal.task == "pick_two_obj_and_place")
    moves = [command for command in game.game["walkthrough"] if command.startswith("move")]
    assert len({" ".join(command.split()[1:3]) for command in moves}) == 2


def test_the_expert_leaves_the_global_generator_alone(games: list[GameFile]) -> None:
    engine = Engine()
    random.seed(7)
    before = random.getstate()
    commands = play_expert(games[0], engine, 50)
    assert random.getstate() == before and commands == games[0].game["walkthrough"]


def test_the_expert_goes_on_after_commands_that_are_not_its_own(games: list[GameFile]) -> None:
    engine = Engine()
    won = 0
    for game in games:
        rng = random.Random(3)
        engine.load(game.game)
        state = engine.reset()
        expert = Expert(game, state)
        for step in range(80):
            command = rng.choice(state.admissible) if step % 4 == 1 else expert.command
            assert command in state.admissible
            state = engine.step(command)
            if state.won:
                won += 1
                break
            expert.follow(command, state)
    assert won >= 4


def test_every_command_has_a_thought(games: list[GameFile]) -> None:
    engine = Engine()
    for game in games:
        engine.load(game.game)
        state = engine.reset()
        for command in game.game["walkthrough"]:
            for admissible in state.admissible:
                clause = thought(admissible, scene_of(state.facts, game.path.room), game.goal, state.feedback)
                assert clause and clause == clause.lower() and '"' not in clause
            state = engine.step(command)


def test_where_games_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, games_folder: Path) -> None:
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    assert games_folder_of(None) == Path("games/alfworld")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))  # without a data set in it
    assert games_folder_of(None) == Path("games/alfworld")
    monkeypatch.setenv("ALFWORLD_DATA", str(games_folder))
    assert games_folder_of(None) == games_folder
    assert games_folder_of(str(tmp_path)) == tmp_path
    with pytest.raises(NoGames, match="coso alfworld make"):
        list_games(tmp_path, "train")


def test_a_scope_narrows_the_games(games_folder: Path) -> None:
    assert len(list_games(games_folder, "train")) == 6
    assert [path.floor_plan for path in list_games(games_folder, "train", rooms=["kitchen"])] == [3, 2]
    assert [path.task for path in list_games(games_folder, "train", tasks=[TASKS[1]])] == [TASKS[1]]
    assert [path.room for path in list_games(games_folder, "train", floor_plans=[203])] == ["livingroom"]
    with pytest.raises(NoGames, match="bathroom"):
        list_games(games_folder, "unseen", rooms=["bathroom"])
    assert (games_folder / DATA_FOLDER / "valid_unseen").is_dir()
