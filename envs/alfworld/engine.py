"""Play an ALFWorld game on the real TextWorld engine: the same texts and commands in a tenth of the time.

`textworld.envs.PddlEnv` parses a game's grammar again for every command and step, copies whole contexts for every
symbol, and translates PDDL twice per load and per reset. This module does each once and keeps the result. The state
machine and the parsers are the engine's own (Fast Downward's library and TextWorld's `State`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.alfworld.grammar import TextGrammar, parse_symbols

NOTHING_HAPPENS = "Nothing happens."
Fact = tuple[str, ...]
"""A predicate and its arguments: ("inreceptacle", "apple 1", "fridge 1")."""

#: Facts that commands cannot change; a command text that depends only on these is derived once per game.
_STATIC_PREDICATES = frozenset({"receptacleatlocation"})
#: The single rule of the task's symbol, if its text has no special characters of the grammar.
_TASK_SENTENCE = re.compile(r'"task": \[\s*\{\s*"rhs": ("Your task is to: [^"\\#\[\]{}<>|;]*")\s*\}\s*\]')
#: Copies of Fast Downward's library from closed engines, for the next engine. Each holds one game. Unloading a used
#: copy would crash the process at the next load.
_idle_libraries: list[Any] = []
_MISSING = (
    "the ALFWorld engine is not installed ({}); it is an optional extra that needs a C++ compiler and cmake: "
    "make setup EXTRAS=alfworld"
)


class EngineMissing(ImportError):
    """`alfworld`, `textworld` or one of their dependencies is not installed."""


class BadGame(ValueError):
    """The engine cannot load a game; the message says why."""


@dataclass(frozen=True)
class EngineState:
    """The engine's state after a reset or step."""

    feedback: str
    admissible: tuple[str, ...]  # sorted, without duplicates
    won: bool
    facts: frozenset[Fact]
    # From AI2-THOR only: (goal conditions that hold, all goal conditions), and the camera's picture.
    conditions: tuple[int, int] | None = None
    frame: NDArray[np.uint8] | None = field(default=None, compare=False)


def import_engine() -> None:
    """Import the engine's modules. Raises `EngineMissing`, which says what to do.

    Importing `alfworld` would create a cache folder in the home directory and set ALFWORLD_DATA for the whole process,
    unless ALFWORLD_DATA is set. This function prevents both.
    """
    data = os.environ.get("ALFWORLD_DATA")
    if "alfworld" not in sys.modules and data is None:
        os.environ["ALFWORLD_DATA"] = tempfile.gettempdir()
    try:
        for module in ("alfworld.gen.constants", "fast_downward", "textworld.envs.pddl.logic"):
            importlib.import_module(module)
    except ImportError as error:
        raise EngineMissing(_MISSING.format(error)) from error
    finally:
        if data is None:
            os.environ.pop("ALFWORLD_DATA", None)


def shipped_text(name: str) -> str:
    """A text file of the `alfworld` wheel's data folder: "alfred.pddl" or "alfred.twl2"."""
    import_engine()
    return (files("alfworld") / "data" / name).read_text()


class Engine:
    """Plays one game at a time; `load` loads the next. Holds a copy of Fast Downward's library until `close`."""

    def __init__(self) -> None:
        import_engine()
        import fast_downward

        self._library = _idle_libraries.pop() if _idle_libraries else fast_downward.load_lib()
        self._game: _LoadedGame | None = None
        self._state: Any = None

    def load(self, game: Mapping[str, Any]) -> None:
        """Load a game, the content of a `game.tw-pddl` file; it replaces the previous one. Raises `BadGame`."""
        try:
            domain, grammar, problem = (str(game[key]) for key in ("pddl_domain", "grammar", "pddl_problem"))
        except (KeyError, TypeError) as error:
            raise BadGame(f"it has no {error}") from None
        self._game = self._state = None
        try:
            loaded = _LoadedGame(domain, grammar, problem)
            loaded.check()
        except BadGame:
            raise
        except (Exception, SystemExit) as error:
            # Parsers of three libraries read the file; Fast Downward's exits the process on invalid input.
            raise BadGame(f"it cannot be read: {type(error).__name__} {error}") from error
        self._game = loaded

    def reset(self) -> EngineState:
        """Start the loaded game."""
        game = self._loaded()
        self._state = game.initial_state(self._library)
        self._facts = {_named(fact, game.names) for fact in self._state.facts if not fact.is_negation}
        return self._look(game.grammar.derive("#intro#", self._state, {}))

    def step(self, command: str) -> EngineState:
        """Execute a command; a command that is not admissible does nothing."""
        game = self._loaded()
        operator = self._operators.get(command.strip())
        if operator is None:
            return self._look(NOTHING_HAPPENS)
        name, *arguments = operator.name.split()
        self._apply(operator)
        feedback = game.grammar.derive(game.feedback(name), self._state, game.mapping(name, arguments))
        return self._look(feedback)

    def plan(self) -> list[str]:
        """Commands that win from the current state, by Fast Downward's planner; [] if it finds none. Takes seconds."""
        game = self._loaded()
        self._library.load_sas_replan(game.translation(optimize=True)[1].encode())
        plan = self._state.replan(game.entities)
        return [" ".join(command.split()) for command in plan]

    def close(self) -> None:
        """Release the library for the next engine."""
        if self._library is not None:
            _idle_libraries.append(self._library)
            self._library = self._game = self._state = None

    def _loaded(self) -> _LoadedGame:
        if self._game is None:
            raise RuntimeError("no game is loaded")
        return self._game

    def _look(self, feedback: str) -> EngineState:
        game = self._loaded()
        self._operators: dict[str, Any] = {}
        for operator in self._state.applicable_operators():
            # As in the engine: if several operators have the same text, the first one is executed.
            self._operators.setdefault(game.command(operator.name, self._state), operator)
        won = bool(self._library.check_goal())
        return EngineState(feedback, tuple(sorted(self._operators)), won, frozenset(self._facts))

    def _apply(self, operator: Any) -> None:
        game = self._loaded()
        for fact in self._state.apply_operator(operator):
            if fact.is_negation:
                self._facts.discard(_named(fact.negate(), game.names))
            else:
                self._facts.add(_named(fact, game.names))


class _LoadedGame:
    """What is computed once per game."""

    def __init__(self, domain: str, grammar: str, problem: str) -> None:
        self._domain, self._problem = domain, problem
        self._logic, self._rules = _logic_and_rules(domain, grammar)
        self._task, self._sas = self.translation(optimize=False)
        self._parameters = {action.name: action.parameters for action in self._task.actions}
        self._commands: dict[str, str] = {}
        self.entities: dict[str, Any] = {}
        self.names: dict[str, str] = {}

    def check(self) -> None:
        """Raise `BadGame` if the grammar has no text for an action."""
        for name in self._parameters:
            if name not in self._logic.actions:
                raise BadGame(f"the domain has the action {name!r}, but the grammar does not")

    def translation(self, optimize: bool) -> tuple[Any, str]:
        """The task in Fast Downward's representation, and as SAS text."""
        return _translate(self._domain, self._problem, optimize)

    def initial_state(self, library: Any) -> Any:
        state = _state_class()(library, self._task, self._sas, self._logic)
        if not self.entities:
            self._name_entities(state)
            self.grammar = TextGrammar(self._rules, self.entities)
        return state

    def mapping(self, action: str, arguments: list[str]) -> dict[Any, Any]:
        """The engine's mapping from an action's placeholders to variables."""
        from textworld.logic import Placeholder, Variable

        return {
            Placeholder(parameter.name.strip("?"), parameter.type_name): Variable(argument, parameter.type_name)
            for parameter, argument in zip(self._parameters[action], arguments, strict=False)
        }

    def feedback(self, action: str) -> str:
        """The grammar symbol of the text after an action."""
        return self._logic.actions[action].feedback_rule

    def command(self, operator: str, state: Any) -> str:
        """The command text of an operator in `state`."""
        if operator in self._commands:
            return self._commands[operator]
        name, *arguments = operator.split()
        template = self._logic.actions[name].template
        mapping = self.mapping(name, arguments)
        derived = self.grammar.derive(template, state, mapping)
        text = derived.format(**{placeholder.name: self.entities[v.name].name for placeholder, v in mapping.items()})
        if _is_static(template):
            self._commands[operator] = text
        return text

    def _name_entities(self, state: Any) -> None:
        from alfworld.agents.utils.misc import Demangler
        from textworld.generator.game import EntityInfo

        for fact in state.facts:
            for variable in fact.arguments:
                if variable.name not in self.entities:
                    self.entities[variable.name] = EntityInfo(variable.name, variable.type)
        demangler = Demangler(game_infos=self.entities)
        for info in self.entities.values():
            info.name = demangler.demangle_alfred_name(info.id)
            info.definite, info.indefinite = "the", "a"
        self.names = {key: info.name.strip() for key, info in self.entities.items()}


def _named(fact: Any, names: Mapping[str, str]) -> Fact:
    return (fact.name, *(names.get(variable.name, variable.name) for variable in fact.arguments))


@lru_cache(maxsize=256)
def _is_static(template: str) -> bool:
    """Whether a command's text depends only on facts that never change."""
    for symbol in parse_symbols(template):
        inner = getattr(symbol, "symbol", symbol)
        given = getattr(inner, "given", None) or getattr(symbol, "given", None)
        if given and {part.split("(")[0].strip() for part in given.split("&")} - _STATIC_PREDICATES:
            return False
        if type(symbol).__name__ == "NonterminalSymbol":
            return False
    return True


def _logic_and_rules(domain: str, grammar: str) -> tuple[Any, dict[str, list[Any]]]:
    """A game's logic and text rules. Games differ only in the task's sentence, so the rest is parsed once."""
    found = _TASK_SENTENCE.findall(grammar)
    if len(found) != 1:
        logic = _logic(domain, grammar)
        return logic, logic.grammar._rules
    logic = _logic(domain, grammar.replace(found[0], '"UNKNOWN GOAL"'))
    from textworld.envs.pddl.textgen import ProductionRule

    sentence = ProductionRule(lhs="task", rhs=parse_symbols(found[0].strip('"')))
    return logic, {**logic.grammar._rules, "task": [sentence]}


@lru_cache(maxsize=4)
def _logic(domain: str, grammar: str) -> Any:
    from textworld.envs.pddl.logic import GameLogic

    return GameLogic(domain=domain, grammar=grammar)


@lru_cache(maxsize=4)
def _translate(domain: str, problem: str, optimize: bool) -> tuple[Any, str]:
    import fast_downward

    arguments, output = sys.argv, sys.stdout
    try:
        return fast_downward.pddl2sas(domain, problem, optimize=optimize)
    finally:
        # The translator changes sys.argv for its option parser and redirects standard output.
        sys.argv, sys.stdout = arguments, output


@lru_cache(maxsize=1)
def _state_class() -> type[Any]:
    """A `PddlState` that takes an existing translation."""
    from collections import Counter, defaultdict

    import fast_downward
    from textworld.envs.pddl.logic import Atom, PddlState
    from textworld.logic import Proposition, Type, Variable

    class TranslatedPddlState(PddlState):
        def __init__(self, library: Any, task: Any, sas: str, logic: Any) -> None:
            self._facts: Any = defaultdict(set)
            self._vars_by_name: dict[str, Any] = {}
            self._vars_by_type: Any = defaultdict(set)
            self._var_counts: Any = Counter()
            self._logic = logic
            self.downward_lib = library
            self.task = task
            self._actions = {action.name: action for action in task.actions}
            for type_ in task.types:
                with contextlib.suppress(ValueError):  # it is already known
                    logic.types.add(Type(type_.name, type_.supertype_names))
            library.load_sas(sas.encode())
            self.name2type = {thing.name: thing.type_name for thing in task.objects}
            for atom in task.init:
                predicate = getattr(atom, "predicate", "=")
                if predicate != "=":
                    arguments = [Variable(argument, self.name2type[argument]) for argument in atom.args]
                    self.add_fact(Proposition(predicate, arguments))
            atoms = (Atom * library.get_state_size())()
            library.get_state(atoms)
            for fact in (atom.get_fact(self.name2type) for atom in atoms):
                if not fact.is_negation:
                    self.add_fact(fact)

        def applicable_operators(self) -> Any:
            operators = (fast_downward.Operator * self.downward_lib.get_applicable_operators_count())()
            self.downward_lib.get_applicable_operators(operators)
            return operators

        def apply_operator(self, operator: Any) -> list[Any]:
            effects = (Atom * operator.nb_effect_atoms)()
            self.downward_lib.apply_operator(operator.id, effects)
            changes = [effect.get_fact(self.name2type) for effect in effects]
            for change in changes:
                self.remove_fact(change.negate())
                self.add_fact(change)
            return changes

    return TranslatedPddlState
