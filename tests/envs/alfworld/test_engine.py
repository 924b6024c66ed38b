"""Our engine says what the engine says, in any process, leaves nothing behind, and runs no code of a game file."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from envs.alfworld.engine import NOTHING_HAPPENS, BadGame, Engine
from envs.alfworld.games import GameFile
from tests.envs.alfworld.plain_engine import PlainEngine, assert_same

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("play", ["expert", "random"])
def test_it_equals_the_engine_driven_directly(engine: Engine, games: list[GameFile], index: int, play: str) -> None:
    """Under expert play to the end, and random play with commands that are not admissible."""
    game = games[index]
    plain = PlainEngine()
    plain.load(game)
    engine.load(game.game)
    rng = random.Random(index)
    theirs, ours = plain.reset(), engine.reset()
    assert_same(theirs, ours)
    walkthrough = game.game["walkthrough"]
    for step in range(len(walkthrough) if play == "expert" else 12):
        if play == "expert":
            command = walkthrough[step]
        else:
            command = rng.choice([*ours.admissible, *ours.admissible, "take moon 1 from sky 1", ""])
        theirs, ours = plain.step(command), engine.step(command)
        assert_same(theirs, ours)
    assert ours.won is (play == "expert")


def test_a_second_reset_and_a_second_game_begin_anew(engine: Engine, games: list[GameFile]) -> None:
    engine.load(games[0].game)
    first = engine.reset()
    for command in games[0].game["walkthrough"]:
        last = engine.step(command)
    assert last.won
    assert engine.reset() == first
    engine.load(games[1].game)
    other = engine.reset()
    assert other.feedback != first.feedback
    engine.load(games[0].game)
    assert engine.reset() == first


def test_what_is_not_admissible_does_nothing(engine: Engine, games: list[GameFile]) -> None:
    engine.load(games[0].game)
    before = engine.reset()
    for command in ("", "open moon 1", "\0", "go to", "LOOK"):
        after = engine.step(command)
        assert after.feedback == NOTHING_HAPPENS
        assert (after.admissible, after.facts, after.won) == (before.admissible, before.facts, before.won)


_PLAY = """
import json, sys
from envs.alfworld.engine import Engine
game = json.load(open(sys.argv[1]))
engine = Engine()
engine.load(game)
states = [engine.reset(), *(engine.step(command) for command in game["walkthrough"])]
print(json.dumps([[state.feedback, state.admissible, sorted(state.facts)] for state in states]))
engine.close()
import os
assert "ALFWORLD_DATA" not in os.environ and sys.argv[1].endswith("game.tw-pddl")
"""


def test_the_same_bytes_in_every_process_and_nothing_left_behind(games: list[GameFile], tmp_path: Path) -> None:
    """Whatever the order of hash sets; and temporary folders and the home directory stay empty."""
    game = tmp_path / "game.tw-pddl"
    game.write_text(json.dumps(games[5].game))
    outputs = set()
    for hash_seed in ("1", "2"):
        home, temporary = tmp_path / f"home{hash_seed}", tmp_path / f"temporary{hash_seed}"
        home.mkdir()
        temporary.mkdir()
        environment = {key: value for key, value in os.environ.items() if key != "ALFWORLD_DATA"}
        environment |= {"PYTHONHASHSEED": hash_seed, "HOME": str(home), "TMPDIR": str(temporary)}
        done = subprocess.run(
            [sys.executable, "-c", _PLAY, str(game)],
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
        assert not list(home.iterdir()) and not list(temporary.iterdir())
    assert len(outputs) == 1


def test_the_grammar_of_a_game_file_runs_no_code(engine: Engine, games: list[GameFile], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    source = games[0].game["grammar"]
    attack = source.replace("{r.name}", f"{{__import__('os').mkdir('{mark}') or r.name}}")
    assert attack != source
    engine.load({**games[0].game, "grammar": attack})
    state = engine.reset()
    with pytest.raises(ValueError, match="unsupported expression"):
        engine.step(next(command for command in state.admissible if command.startswith("go to")))
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"pddl_problem": "(define (problem"},
        {"pddl_problem": "no PDDL at all"},
        {"pddl_domain": ""},
        {"grammar": "grammar :: nothing"},
        {"grammar": None},
    ],
)
def test_a_broken_game_is_told_so_and_the_next_one_plays(
    engine: Engine, games: list[GameFile], change: dict[str, str | None]
) -> None:
    with pytest.raises(BadGame):
        engine.load({**games[0].game, **change})
    with pytest.raises(RuntimeError, match="no game"):
        engine.reset()
    engine.load(games[0].game)
    assert engine.reset().admissible


def test_a_game_without_its_parts_is_told_so(engine: Engine) -> None:
    with pytest.raises(BadGame, match="pddl_domain"):
        engine.load({})


def test_engines_come_and_go_beside_others(games: list[GameFile]) -> None:
    """Unloading a library that has played crashes the process at the next load; two engines must not share one."""
    engines = []
    for number in range(6):
        one = Engine()
        one.load(games[number].game)
        first = one.reset()
        if number % 2:
            one.close()
            one.close()
        else:
            engines.append((number, one, first))
    for number, one, first in engines:
        assert one.step("look").admissible == first.admissible
        one.load(games[number].game)
        assert one.reset() == first
        one.close()


def test_the_planner_wins(engine: Engine, games: list[GameFile]) -> None:
    engine.load(games[0].game)
    state = engine.reset()
    for command in engine.plan():
        assert command in state.admissible
        state = engine.step(command)
    assert state.won
