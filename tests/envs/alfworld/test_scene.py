"""What the agent faces and how far it is from its goal, against the engine's texts and verdict."""

import random
import re
from collections.abc import Iterator

import pytest

from envs.alfworld import names
from envs.alfworld.engine import Engine, EngineState, import_engine
from envs.alfworld.games import GameFile
from envs.alfworld.scene import Goal, goal_conditions, scene_of


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


def visited(engine: Engine, game: GameFile) -> Iterator[tuple[str, EngineState]]:
    """(command, state) along the solution with a detour at every third step."""
    rng = random.Random(0)
    engine.load(game.game)
    state = engine.reset()
    yield "", state
    for step, command in enumerate(game.game["walkthrough"]):
        if step % 3 == 2:
            aside = rng.choice([c for c in state.admissible if c.split()[0] in ("examine", "look", "inventory")])
            state = engine.step(aside)
            yield aside, state
        state = engine.step(command)
        yield command, state


@pytest.mark.parametrize("index", range(6))
def test_the_goal_is_met_exactly_where_the_engine_says_won(engine: Engine, games: list[GameFile], index: int) -> None:
    game = games[index]
    rates = []
    for _, state in visited(engine, game):
        met, total = goal_conditions(state.facts, game.goal)
        assert 0 <= met <= total
        assert (met == total) is state.won
        rates.append(met)
    assert rates[0] < rates[-1]


@pytest.mark.parametrize("index", range(6))
def test_the_scene_shows_what_the_text_tells(engine: Engine, games: list[GameFile], index: int) -> None:
    game = games[index]
    for command, state in visited(engine, game):
        scene = scene_of(state.facts, game.path.room)
        if told := re.search(r"(?:On the|In it|The) ?([a-z]+ \d+)?[^.]*, you see ([^.]*)\.", state.feedback):
            place = told[1] or " ".join(command.split()[-2:])
            seen = next(each for each in scene.places if each.name == place)
            assert sorted(re.findall(r"[a-z]+ \d+", told[2])) == sorted(thing.name for thing in seen.things)
            assert seen.is_open is not False
        if told := re.match(r"You arrive at [a-z]+ \d+\. The ([a-z]+ \d+) is closed", state.feedback):
            seen = next(each for each in scene.places if each.name == told[1])
            assert seen.is_open is False and seen.things == ()
        if command.startswith("take"):
            assert scene.held is not None and scene.held.name == " ".join(command.split()[1:3])
        if command.startswith(("heat", "cool", "clean")):
            state_word = command.split()[0].replace("heat", "hot")
            assert scene.held is not None and state_word in scene.held.states
        if command == "":
            assert scene.places == () and set(re.findall(r"[a-z]+ \d+", state.feedback)) == set(scene.all_places)


FACTS = frozenset(
    {
        ("receptacleatlocation", "desk 1", "loc 1"),
        ("receptacleatlocation", "desk 2", "loc 2"),
        ("inreceptacle", "pen 1", "desk 1"),
        ("inreceptacle", "pen 2", "desk 2"),
        ("inreceptacle", "desklamp 1", "desk 1"),
        ("istoggled", "desklamp 1"),
        ("isclean", "pen 1"),
        ("ishot", "pen 3"),
        ("holds", "agent1", "pen 3"),
        ("atlocation", "agent1", "loc 1"),
    }
)


@pytest.mark.parametrize(
    ("goal", "met", "total"),
    [
        (Goal("pick_and_place_simple", "pen", "desk"), 1, 1),
        (Goal("pick_and_place_simple", "pen", "shelf"), 0, 1),
        (Goal("pick_two_obj_and_place", "pen", "desk"), 1, 2),  # two pens, but not on the same desk
        (Goal("pick_clean_then_place_in_recep", "pen", "desk"), 3, 3),
        (Goal("pick_heat_then_place_in_recep", "pen", "desk"), 2, 3),  # one is hot, others are there
        (Goal("pick_cool_then_place_in_recep", "pen", "desk"), 1, 3),
        (Goal("look_at_obj_in_light", "pen", "", "desklamp"), 2, 2),
        (Goal("look_at_obj_in_light", "book", "", "desklamp"), 1, 2),
        (Goal("look_at_obj_in_light", "pen", "", "floorlamp"), 1, 2),
    ],
)
def test_conditions_are_counted_as_in_the_simulator(goal: Goal, met: int, total: int) -> None:
    assert goal_conditions(FACTS, goal) == (met, total)


def test_a_lamp_that_is_on_somewhere_else_does_not_count() -> None:
    elsewhere = (FACTS - {("atlocation", "agent1", "loc 1")}) | {("atlocation", "agent1", "loc 2")}
    assert goal_conditions(elsewhere, Goal("look_at_obj_in_light", "pen", "", "desklamp")) == (1, 2)


def test_our_names_are_all_of_the_engine_s() -> None:
    import_engine()
    from alfworld.gen import constants

    known = {*names.OBJECTS, *names.RECEPTACLES}
    assert len(known) == len(names.OBJECTS) + len(names.RECEPTACLES)
    assert {kind.lower() for kind in constants.OBJECTS} <= known
    movable = constants.MOVABLE_RECEPTACLES_SET
    assert {kind.lower() for kind in constants.RECEPTACLES - movable} == set(names.RECEPTACLES)
