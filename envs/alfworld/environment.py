"""`coso/ALFWorld-v0`: household tasks by commands, on the real TextWorld engine or in AI2-THOR."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from envs.alfworld.commands import COMMAND_LABELS, AnyCommandParser, find_admissible, parsed, searched_from, unparsed
from envs.alfworld.engine import BadGame, Engine, EngineState
from envs.alfworld.expert import Expert, thought
from envs.alfworld.games import GameFile, GamePath, NoGames, games_folder, list_games, read_game
from envs.alfworld.names import OBJECTS, RECEPTACLES, ROOMS, SPLITS, TASKS, kind_of
from envs.alfworld.picture import SIZE, blank_picture, draw_scene
from envs.alfworld.scene import Scene, goal_conditions, scene_of
from envs.base import InvalidActionPolicy, TextActionEnv
from envs.labels import LabelSpace, ParsedAction
from envs.prompts import json_answer

Mode = Literal["text+image", "text", "image"]

logger = logging.getLogger(__name__)

#: Published horizon, and reward for a victory.
HORIZON = 50
VICTORY = 50.0
_TASK_MARK = "Your task is to: "


class ALFWorld(TextActionEnv):
    """`coso/ALFWorld-v0`: find things in a room, change them and put them somewhere, one command per step.

    The prompt holds the task, the engine's answer to the last command, and the admissible commands. The picture shows
    what the agent sees (`envs/alfworld/picture.py`). `mode`: "text+image"; "text": the picture is blank; "image": the
    prompt leaves out the engine's answer.

    Action: the admissible command that an utterance names (`find_admissible`). Reward, as published: 50 for victory,
    plus the share of the goal's conditions that hold, minus 1 for an utterance that names no admissible command;
    terminated at victory, truncated after `horizon` steps. Before the first reset, `parse` accepts any valid command.

    A seed draws a game of the split. If a game file is missing, broken or unsolvable, the next one is played instead:
    the log names it, and `info["skipped_games"]` counts it. State: {"game": name, "commands": [commands so far]}.
    `info` also has `goal_condition_rate` in [0, 1], `admissible_commands` and `task`.
    """

    image_shape = (SIZE, SIZE, 3)
    state_label_names = ("faced", "open", "held", "things", "first_thing")

    def __init__(
        self,
        games: str | None = None,
        split: str = "train",
        tasks: Sequence[str] = (),
        rooms: Sequence[str] = (),
        floor_plans: Sequence[int] = (),
        mode: Mode = "text+image",
        backend: Literal["textworld", "thor"] = "textworld",
        horizon: int = HORIZON,
        history: int = 0,
        expert: Literal["handcoded", "planner"] = "handcoded",
        invalid_action: InvalidActionPolicy = "penalty",
        render_mode: str | None = None,
    ) -> None:
        """`games`: folder (default: ALFWORLD_DATA, else games/alfworld); `split`: train, seen or unseen; `tasks`,
        `rooms`, `floor_plans`: only games of these; `history`: number of last commands in the prompt;
        `backend`: "thor" plays in AI2-THOR (`envs/alfworld/thor.py`); `expert`: the engine's hand-coded one, which
        searches, or Fast Downward's planner, which knows where everything is and takes seconds per step.

        Raises `EngineMissing` if the extra is not installed, `NoGames`, and ValueError for a wrong argument.
        """
        super().__init__(invalid_action, render_mode)
        _check_choices("mode", [mode], get_args(Mode))
        _check_choices("split", [split], tuple(SPLITS))
        _check_choices("tasks", tasks, TASKS)
        _check_choices("rooms", rooms, ROOMS)
        _check_choices("backend", [backend], ("textworld", "thor"))
        _check_choices("expert", [expert], ("handcoded", "planner"))
        for name, value, least in (("horizon", horizon, 1), ("history", history, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        self.mode = mode
        self._horizon = horizon
        self._history = history
        self._expert_type = expert
        self._games = list_games(games_folder(games), split, tasks, rooms, floor_plans)
        self._backend = backend
        self._engine: Any = _thor_engine() if backend == "thor" else Engine()
        self._bad: dict[str, str] = {}
        self._begun = False

    # The contract of TextActionEnv.

    @property
    def label_space(self) -> LabelSpace:
        return COMMAND_LABELS

    @property
    def horizon(self) -> int:
        return self._horizon

    @property
    def prompt(self) -> str:
        parts = ["You are an expert in the ALFRED embodied environment."]
        parts.append(f"Your task is to: {self._task}")
        if self._history:
            done = "; ".join(self._commands[-self._history :])
            parts.append(f"Your last actions: {done or 'none'}.")
        if self.mode != "image":
            parts.append(f"What you see: {self._observation_text()}")
        parts.append(f"Your admissible actions are: [{', '.join(self._state.admissible)}].")
        parts.append(
            'Answer in JSON: {"thoughts": "what do you see, and which action completes the task", '
            '"action": "an admissible action"}'
        )
        return "\n".join(parts)

    @property
    def state(self) -> dict[str, Any]:
        return {"game": self._game.path.name, "commands": list(self._commands)}

    def extra_info(self) -> dict[str, Any]:
        met, total = self._conditions()
        return {
            "task": self._game.goal.task,
            "goal_condition_rate": met / total,
            "admissible_commands": list(self._state.admissible),
            "skipped_games": len(self._bad),
        }

    @property
    def invalid_penalty(self) -> float:  # type: ignore[override]
        """The published reward of an utterance that names no admissible command."""
        met, total = self._conditions()
        return met / total - 1.0

    @property
    def state_label_sizes(self) -> tuple[int, ...]:
        return (len(RECEPTACLES) + 1, 3, len(OBJECTS) + 1, _MOST_THINGS + 1, len(OBJECTS) + 1)

    def state_labels(self) -> NDArray[np.int32]:
        scene = self._scene()
        place = scene.places[0] if scene.places else None
        things = scene.things
        return np.array(
            [
                _number(place.name if place else "", RECEPTACLES),
                0 if place is None or place.is_open is None else 1 + place.is_open,
                _number(scene.held.name if scene.held else "", OBJECTS),
                min(len(things), _MOST_THINGS),
                _number(things[0].name if things else "", OBJECTS),
            ],
            dtype=np.int32,
        )

    def parse(self, utterance: str) -> ParsedAction:
        """The admissible command that an utterance names; before the first reset, any well-formed one."""
        if not self._begun:
            return self.parser.parse(utterance)
        command, start = find_admissible(utterance, self._state.admissible), searched_from(utterance)
        return parsed(command, start) if command else unparsed(start)

    @property
    def parser(self) -> AnyCommandParser:
        return AnyCommandParser()

    def random_action(self, rng: np.random.Generator | None = None) -> str:
        """A uniformly random admissible command."""
        admissible = self._state.admissible
        return admissible[int((self.np_random if rng is None else rng).integers(len(admissible)))]

    def expert_utterance(self, rng: np.random.Generator, noise: float = 0.0, habit: str = "") -> str:
        """The expert's thought and command. A `habit` is a command; it is used only if it is admissible.

        Raises NotImplementedError in AI2-THOR.
        """
        if self._backend == "thor":
            raise NotImplementedError("the experts read the game's facts, which AI2-THOR does not have")
        habit = habit if habit in self._state.admissible else ""
        command = self.with_noise(self._expert_command(), rng, noise, habit)
        return json_answer(
            {"thoughts": thought(command, self._scene(), self._game.goal, self._state.feedback)}, command
        )

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    # One episode.

    def _set_state(self, state: dict[str, Any] | None) -> None:
        if state is None:
            self._draw_game()
            self._commands: list[str] = []
        else:
            self._restore(state)
        self._begun = True

    def _draw_game(self) -> None:
        first = int(self.np_random.integers(len(self._games)))
        for offset in range(len(self._games)):
            path = self._games[(first + offset) % len(self._games)]
            try:
                return self._begin(path)
            except BadGame as error:
                self._skip(path, error)
        raise NoGames(
            f"none of the {len(self._games)} games can be played; the first problem: {next(iter(self._bad.values()))}"
        )

    def _skip(self, path: GamePath, error: BadGame) -> None:
        if path.name not in self._bad:
            self._bad[path.name] = str(error)
            logger.warning("skipping ALFWorld game %s: %s", path.name, error)

    def _begin(self, path: GamePath) -> None:
        game = read_game(path)
        self._engine.load(game if self._backend == "thor" else game.game)
        try:
            self._state = self._first = self._engine.reset()
        except ValueError as error:
            raise BadGame(str(error)) from error
        self._game: GameFile = game
        self._task = self._state.feedback.rpartition(_TASK_MARK)[2].strip()
        self._past: list[tuple[str, EngineState]] = []
        self._expert: Expert | None = None

    def _restore(self, state: dict[str, Any]) -> None:
        if set(state) != {"game", "commands"} or not isinstance(state["commands"], list | tuple):
            raise ValueError("an ALFWorld state has 'game', a game's name, and 'commands', a list")
        by_name = {path.name: path for path in self._games}
        if state["game"] not in by_name:
            raise ValueError(f"there is no game {state['game']!r} among the {len(by_name)} of this split and scope")
        self._begin(by_name[state["game"]])
        self._commands = []
        for command in state["commands"]:
            if command not in self._state.admissible:
                raise ValueError(f"command {command!r} is not admissible after {self._commands}")
            self._do(command)
            if self._state.won:
                raise ValueError("an ALFWorld episode cannot start at its goal")

    def _act(self, action: str) -> tuple[float, bool, bool]:
        if not action:
            self._state = self._engine.step("")
            self._past.append(("", self._state))
            return 0.0, False, False
        self._do(action)
        met, total = self._conditions()
        return VICTORY * self._state.won + met / total, self._state.won, self._state.won

    def _do(self, command: str) -> None:
        self._state = self._engine.step(command)
        self._commands.append(command)
        self._past.append((command, self._state))

    def _picture(self) -> NDArray[np.uint8]:
        if self.mode == "text":
            return blank_picture()
        return draw_scene(self._scene()).copy() if self._state.frame is None else self._state.frame.copy()

    def _scene(self) -> Scene:
        return scene_of(self._state.facts, self._game.path.room)

    def _conditions(self) -> tuple[int, int]:
        return self._state.conditions or goal_conditions(self._state.facts, self._game.goal)

    def _observation_text(self) -> str:
        """The engine's answer to the last command; at the start the room's description, without banner and task."""
        text = self._state.feedback.rpartition("-= Welcome to TextWorld, ALFRED! =-")[2].partition(_TASK_MARK)[0]
        return " ".join(text.split())

    def _expert_command(self) -> str:
        if self._expert_type == "planner":
            plan = self._engine.plan()
            return plan[0] if plan and plan[0] in self._state.admissible else "look"
        # The expert follows the episode only when asked, since reinforcement learning never asks it.
        if self._expert is None:
            self._expert = Expert(self._game, self._first)
            self._followed = 0
        for command, after in self._past[self._followed :]:
            self._expert.follow(command, after)
        self._followed = len(self._past)
        return self._expert.command


def _thor_engine() -> Any:
    from envs.alfworld.thor import ThorEngine

    return ThorEngine()


#: Largest value of the label that counts visible things.
_MOST_THINGS = 15


def _number(name: str, kinds: tuple[str, ...]) -> int:
    """1 + the index of a thing's kind; 0 for none."""
    kind = kind_of(name)
    return kinds.index(kind) + 1 if kind in kinds else 0


def _check_choices(name: str, values: Sequence[Any], allowed: tuple[str, ...]) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list, not {values!r}")
    for value in values:
        if value not in allowed:
            raise ValueError(f"{name} must be of {', '.join(allowed)}, not {value!r}")
