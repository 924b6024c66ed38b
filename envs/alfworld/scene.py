"""What the agent sees, from the game's facts, and the conditions of the goal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from envs.alfworld.engine import Fact
from envs.alfworld.names import kind_of

#: Facts about a single thing -> the word for its state.
STATE_PREDICATES = {"isclean": "clean", "ishot": "hot", "iscool": "cool", "istoggled": "on", "issliced": "sliced"}
#: In the order in which they are drawn.
STATES = tuple(STATE_PREDICATES.values())


@dataclass(frozen=True)
class Thing:
    """A movable thing or a lamp: its name ("apple 2") and its states, in the order of `STATES`."""

    name: str
    states: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """A receptacle: its name, whether it is open (None: it cannot be closed), and visible contents, sorted by name."""

    name: str
    is_open: bool | None
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Scene:
    """What the agent sees. `places`: receptacles at its location, sorted by name; none in the middle of the room."""

    room: str
    places: tuple[Place, ...]
    held: Thing | None
    all_places: tuple[str, ...]  # every receptacle of the room, sorted by name

    @property
    def things(self) -> tuple[Thing, ...]:
        """All visible things in or on the receptacles at the agent's location."""
        return tuple(thing for place in self.places for thing in place.things)


def by_name(name: str) -> tuple[str, int]:
    """Sort key that puts "shelf 2" before "shelf 10"."""
    kind, _, number = name.partition(" ")
    return kind, int(number) if number.isdigit() else 0


def scene_of(facts: Iterable[Fact], room: str) -> Scene:
    """The scene of a state's facts. A closed receptacle hides its contents."""
    where: set[str] = set()
    locations: dict[str, str] = {}
    openable: set[str] = set()
    opened: set[str] = set()
    contents: dict[str, list[str]] = {}
    states: dict[str, set[str]] = {}
    held = ""
    for predicate, *arguments in facts:
        if predicate == "atlocation":
            where.add(arguments[1])
        elif predicate == "receptacleatlocation":
            locations[arguments[0]] = arguments[1]
        elif predicate == "openable":
            openable.add(arguments[0])
        elif predicate == "opened":
            opened.add(arguments[0])
        elif predicate == "inreceptacle":
            contents.setdefault(arguments[1], []).append(arguments[0])
        elif predicate == "holds":
            held = arguments[1]
        elif predicate in STATE_PREDICATES:
            states.setdefault(arguments[0], set()).add(STATE_PREDICATES[predicate])

    def thing(name: str) -> Thing:
        return Thing(name, tuple(state for state in STATES if state in states.get(name, ())))

    places = []
    for name in sorted((place for place, location in locations.items() if location in where), key=by_name):
        is_open = name in opened if name in openable else None
        seen = sorted(contents.get(name, ()), key=by_name) if is_open is not False else ()
        places.append(Place(name, is_open, tuple(thing(each) for each in seen)))
    return Scene(room, tuple(places), thing(held) if held else None, tuple(sorted(locations, key=by_name)))


@dataclass(frozen=True)
class Goal:
    """A game's goal: the task type and the kinds of things in it, in lower case ("": none)."""

    task: str
    target: str
    receptacle: str = ""
    lamp: str = ""


def goal_conditions(facts: Iterable[Fact], goal: Goal) -> tuple[int, int]:
    """(how many conditions of the goal hold, how many there are), as `alfworld/env/tasks.py` counts them in AI2-THOR.

    All conditions hold if and only if the engine reports the game as won.
    """
    inside: dict[str, set[str]] = {}  # receptacle of the goal's kind -> targets in it
    lamp_places: set[str] = set()
    at: set[str] = set()
    locations: dict[str, str] = {}
    toggled: set[str] = set()
    changed: set[str] = set()
    holds_target = False
    change = {
        "pick_clean_then_place_in_recep": "isclean",
        "pick_heat_then_place_in_recep": "ishot",
        "pick_cool_then_place_in_recep": "iscool",
    }.get(goal.task, "")
    lamps_in: dict[str, set[str]] = {}
    for predicate, *arguments in facts:
        if predicate == "inreceptacle":
            thing, place = arguments
            if kind_of(thing) == goal.target and kind_of(place) == goal.receptacle:
                inside.setdefault(place, set()).add(thing)
            if goal.lamp and kind_of(thing) == goal.lamp:
                lamps_in.setdefault(thing, set()).add(place)
        elif predicate == "atlocation":
            at.add(arguments[1])
        elif predicate == "receptacleatlocation":
            locations[arguments[0]] = arguments[1]
        elif predicate == "istoggled":
            toggled.add(arguments[0])
        elif predicate == "holds":
            holds_target = kind_of(arguments[1]) == goal.target
        elif predicate == change and kind_of(arguments[0]) == goal.target:
            changed.add(arguments[0])
    if goal.task == "pick_and_place_simple":
        return int(bool(inside)), 1
    if goal.task == "pick_two_obj_and_place":
        return min(max(map(len, inside.values()), default=0), 2), 2
    if goal.task == "look_at_obj_in_light":
        lamp_places = {locations.get(place, "") for lamp in toggled for place in lamps_in.get(lamp, ())}
        return int(holds_target) + int(bool(lamp_places & at)), 2
    placed = set().union(*inside.values())
    return int(bool(placed)) + int(bool(changed)) + int(bool(placed & changed)), 3
