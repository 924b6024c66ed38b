"""The AI2-THOR backend of ALFWorld: the same tasks with the simulator's camera picture. Never run so far.

It needs the requirements of `alfworld[vis]` (ai2thor 2.1.0, torch, torchvision, OpenCV), AI2-THOR's Unity build, an X
display, and the published data set, whose trajectories hold the object poses. None of these were available in
development. The code follows `alfworld.env.thor_env.ThorEnv` and `alfworld.agents.controller.OracleAgent` of
alfworld 0.4.2, as `alfworld.agents.environment.AlfredThorEnv` drives them.
"""

from __future__ import annotations

from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import numpy as np

from envs.alfworld.engine import NOTHING_HAPPENS, BadGame, EngineMissing, EngineState, import_engine
from envs.alfworld.games import DATA_FOLDER, GameFile
from envs.alfworld.picture import SIZE


class ThorEngine:
    """Plays one game at a time in its own Unity process; `close` ends the process."""

    def __init__(self) -> None:
        import_engine()
        try:
            from alfworld.env.thor_env import ThorEnv
        except ImportError as error:
            raise EngineMissing(
                f"the thor backend is not installed ({error}); it needs alfworld[vis], AI2-THOR's build and a display"
            ) from error
        self._thor = ThorEnv(player_screen_height=SIZE, player_screen_width=SIZE)
        self._game: GameFile | None = None
        self._controller: Any = None

    def load(self, game: GameFile) -> None:
        """Load a game of the published data set. Raises `BadGame` if it has no object poses."""
        missing = {"object_poses", "object_toggles", "dirty_and_empty", "init_action"} - set(game.trajectory["scene"])
        if missing or "plan" not in game.trajectory:
            lacks = ", ".join(sorted(missing)) or "plan"
            raise BadGame(f"its trajectory has no {lacks}: AI2-THOR plays games of the published data set only")
        self._game = game

    def reset(self) -> EngineState:
        """Restore the recorded scene and start."""
        from alfworld.agents.controller import OracleAgent

        assert self._game is not None
        trajectory = self._game.trajectory
        scene = trajectory["scene"]
        self._thor.reset(f"FloorPlan{scene['scene_num']}")
        self._thor.restore_scene(scene["object_poses"], scene["object_toggles"], scene["dirty_and_empty"])
        self._thor.step(dict(scene["init_action"]))
        rewards = SimpleNamespace(reward_config=str(files("alfworld") / "agents" / "config" / "rewards.json"))
        self._thor.set_task(trajectory, rewards, reward_type="dense")
        path = self._game.path
        folder = path.folder / DATA_FOLDER / path.name
        self._controller = OracleAgent(self._thor, trajectory, str(folder), load_receps=False)
        return self._look(self._controller.feedback)

    def step(self, command: str) -> EngineState:
        """Execute a command; a command that is not admissible does nothing."""
        if command not in self._controller.get_admissible_commands():
            return self._look(NOTHING_HAPPENS)
        return self._look(self._controller.step(command))

    def close(self) -> None:
        """End the Unity process."""
        self._thor.stop()

    def _look(self, feedback: str) -> EngineState:
        met, total = self._thor.get_goal_conditions_met()
        return EngineState(
            feedback,
            tuple(sorted(set(self._controller.get_admissible_commands()))),
            bool(self._thor.get_goal_satisfied()),
            frozenset(),
            conditions=(int(met), int(total)),
            frame=np.array(self._thor.last_event.frame, np.uint8),
        )
