"""The engine as `alfworld` itself drives it, without anything of ours: what ours is compared with."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from envs.embodied.engine import EngineState, import_engine
from envs.embodied.games import DATA_FOLDER, GAME_FILE, GameFile


class PlainEngine:
    """`alfworld`'s own stack of wrappers round TextWorld's `PddlEnv`."""

    def __init__(self) -> None:
        import_engine()
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
        from textworld.envs import PddlEnv

        infos = textworld.EnvInfos(won=True, admissible_commands=True, facts=True)
        self._env = AlfredInfos(AlfredDemangler(PddlEnv(infos), shuffle=False))

    def load(self, game: GameFile) -> None:
        self._env.load(str(game.path.folder / DATA_FOLDER / game.path.name / GAME_FILE))

    def reset(self) -> Any:
        return self._env.reset()

    def step(self, command: str) -> Any:
        """The engine's `GameState`, with its reward as `score`."""
        state, reward, _ = self._env.step(command)
        assert reward == state["score"]
        return state


def write_game(game: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GAME_FILE).write_text(json.dumps(game))
    return folder / GAME_FILE


def assert_same(plain: Any, ours: EngineState, exact: bool) -> None:
    """All that an agent can learn is the same; the order of things listed too, where `exact`."""
    assert tuple(plain["admissible_commands"]) == ours.admissible
    assert plain["won"] is ours.won
    assert {(f.name, *(name.strip() for name in f.names)) for f in plain["facts"] if not f.is_negation} == ours.facts
    if exact:
        assert plain["feedback"] == ours.feedback
    else:
        assert without_order(plain["feedback"]) == without_order(ours.feedback)


def without_order(text: str) -> tuple[str, list[str]]:
    """A feedback with the things it lists apart and in order: the engine lists them in the order of a hash set."""
    things = sorted(re.findall(r"\ban? ([a-z]+ \d+)", text))
    return re.sub(r"\ban? [a-z]+ \d+(, (and )?)?", "", text), things


@contextmanager
def listing_in_order() -> Iterator[None]:
    """Have the plain engine list things in the order of their ids, as ours does."""
    from textworld.logic import State

    plain = State.facts_with_signature
    State.facts_with_signature = lambda self, sig: sorted(plain(self, sig), key=str)
    try:
        yield
    finally:
        State.facts_with_signature = plain
