"""The engine as `alfworld` itself drives it, without anything of ours: what ours is compared with."""

from typing import Any

from envs.alfworld.engine import EngineState, import_engine
from envs.alfworld.games import DATA_FOLDER, GAME_FILE, GameFile


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


def assert_same(plain: Any, ours: EngineState) -> None:
    """All that can be learned of a state is the same, the text byte for byte."""
    assert plain["feedback"] == ours.feedback
    assert tuple(plain["admissible_commands"]) == ours.admissible
    assert plain["won"] is ours.won
    assert {(f.name, *(name.strip() for name in f.names)) for f in plain["facts"] if not f.is_negation} == ours.facts
