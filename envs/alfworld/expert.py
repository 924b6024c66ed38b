"""The engine's hand-coded expert, adapted to the engine's current commands, and thoughts for its commands.

`alfworld`'s expert searches where things belong, takes, changes and places them. It was written for the old command
`put mug 1 in/on desk 1` and needs that verb to notice that its hands are empty. So this module translates
`move mug 1 to desk 1` for it. The expert draws from Python's global generator; here it gets its own generator.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from envs.alfworld.commands import command_labels
from envs.alfworld.engine import NOTHING_HAPPENS, EngineState
from envs.alfworld.games import GameFile
from envs.alfworld.names import kind_of
from envs.alfworld.scene import Goal, Scene

#: The expert gives up after this many steps; episodes are shorter.
_MOST_STEPS = 200


class Expert:
    """Follows one episode from its start and chooses the next command.

    It sees only the texts and the facts that the engine's expert looks up, so it searches like a player.
    """

    def __init__(self, game: GameFile, first: EngineState, seed: int = 0) -> None:
        from alfworld.agents.expert.handcoded_expert_tw import HandCodedTWAgent
        from alfworld.gen import constants

        self._generator = random.Random(seed)
        self._agent = HandCodedTWAgent(max_steps=_MOST_STEPS)
        names = game.trajectory["pddl_params"]
        # The same as `HandCodedAgent.reset`, with a trajectory that is already loaded.
        parameters = {key: value.lower() if value in constants.OBJECTS else value for key, value in names.items()}
        self._agent.task_params = {**parameters, "task_type": game.goal.task}
        self._agent.policy = self._agent.get_task_policy(self._agent.task_params)(
            self._agent.task_params, max_steps=_MOST_STEPS
        )
        self._agent.observe(first.feedback)
        self.command = "look"

    def follow(self, command: str, after: EngineState) -> None:
        """Observe a step: the executed command ("" if it was not admissible) and the state after it."""
        words = command.split()
        if words and words[0] == "move":
            said = f"put {' '.join(words[1:3])} in/on {' '.join(words[4:6])}"
        else:
            said = command or "look"
        state = {"feedback": after.feedback, "admissible_commands": after.admissible, "facts": _as_propositions(after)}
        with _global_generator(self._generator):
            try:
                wish = self._agent.act(state, 0, after.won, said)
            except Exception:
                # The engine's expert is heuristic. If a heuristic fails (it takes an empty hand for full, no steps are
                # left), it gives no command.
                wish = "look"
        self.command = wish if wish in after.admissible else _renamed(wish, after.admissible)


def play_expert(game: GameFile, engine: Any, horizon: int, seed: int = 0) -> list[str] | None:
    """The expert's commands until it wins within `horizon` steps, or None if it does not."""
    engine.load(game.game)
    state = engine.reset()
    expert = Expert(game, state, seed)
    done: list[str] = []
    while not state.won and len(done) < horizon:
        command = expert.command
        state = engine.step(command)
        done.append(command)
        expert.follow(command, state)
    return done if state.won else None


def thought(command: str, scene: Scene, goal: Goal, feedback: str = "") -> str:
    """A thought for a command: why a player with this goal in this scene gives it; one or two clauses, lower case."""
    labels = command_labels(command)
    verb = labels["verb"]
    words = command.split()
    holds_target = scene.held is not None and kind_of(scene.held.name) == goal.target
    seeks = f"i look for {_a(goal.target)}"
    if verb == "go":
        place = " ".join(words[2:])
        if not holds_target:
            why = seeks
        else:
            why = f"i hold the {scene.held.name if scene.held else ''}, {_next_need(scene, goal)}"
        return f"{why}, so i go to {place}"
    if verb == "open":
        return f"the {' '.join(words[1:])} is closed, so i open it to look inside"
    if verb == "close":
        return f"i am done with the {' '.join(words[1:])}, so i close it"
    if verb == "take":
        need = " that i need" if words[1] == goal.target else ""
        return f"i see the {' '.join(words[1:3])}{need}, so i take it"
    if verb == "move":
        return f"i hold the {' '.join(words[1:3])} and am at the {' '.join(words[-2:])}, so i put it there"
    if verb in ("heat", "cool", "clean"):
        return f"the {' '.join(words[1:3])} has to be {_CHANGED[str(verb)]}, so i {verb} it with the {words[-2]}"
    if verb == "use":
        return f"i hold the {goal.target} and see the {' '.join(words[1:])}, so i turn it on"
    if verb == "examine":
        return f"i look closer at the {' '.join(words[1:])}"
    return "that did nothing, so i look around" if feedback == NOTHING_HAPPENS else "i take a look around"


_CHANGED = {"heat": "hot", "cool": "cool", "clean": "clean"}
_NEEDED_STATE = {
    "pick_clean_then_place_in_recep": ("clean", "a sinkbasin"),
    "pick_heat_then_place_in_recep": ("hot", "a microwave"),
    "pick_cool_then_place_in_recep": ("cool", "a fridge"),
}


def _next_need(scene: Scene, goal: Goal) -> str:
    assert scene.held is not None
    if goal.task == "look_at_obj_in_light":
        return f"i need the {goal.lamp}"
    state, at = _NEEDED_STATE.get(goal.task, ("", ""))
    if state and state not in scene.held.states:
        return f"it has to be {state} and needs {at}"
    return f"it belongs in the {goal.receptacle}"


def _a(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "aeiou" else f"a {kind}"


def _renamed(wish: str, admissible: Sequence[str]) -> str:
    """The expert's command in the words of an older game, or "look" if its command is not admissible."""
    words = wish.split()
    if len(words) == 6 and words[0] == "move":
        older = f"put {words[1]} {words[2]} in/on {words[4]} {words[5]}"
        if older in admissible:
            return older
    return "look"


def _as_propositions(state: EngineState) -> list[Any]:
    """The facts in the form the expert reads: objects with `name` and `names`."""
    return [SimpleNamespace(name=predicate, names=names) for predicate, *names in sorted(state.facts)]


@contextlib.contextmanager
def _global_generator(generator: random.Random) -> Iterator[None]:
    """Make the functions of module `random` draw from `generator` during the block."""
    outside = random.getstate()
    random.setstate(generator.getstate())
    try:
        yield
    finally:
        generator.setstate(random.getstate())
        random.setstate(outside)
