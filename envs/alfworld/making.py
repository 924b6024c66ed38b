"""Make ALFWorld games from the data in the `alfworld` wheel: floor plans, a PDDL domain, a grammar and goals.

The published games are recordings of AI2-THOR scenes. This module places things on the floor plan's receptacles
according to ALFWorld's own tables, so it needs no download and no simulator. A seed determines a game.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from envs.alfworld.engine import import_engine, shipped_text
from envs.alfworld.names import FLOOR_PLANS, TASK_ROOMS, TASKS, UNSEEN_FLOOR_PLANS, room_of

#: Smallest and largest number of things besides the task's own.
_DISTRACTORS = (8, 18)
_MOST_OF_A_KIND = 3
_LAMPS = ("DeskLamp", "FloorLamp")
_LAMP_PLACES = ("Desk", "SideTable", "Dresser", "Shelf", "CoffeeTable", "TVStand")
#: Task -> the property its object needs, and the receptacle that changes the object's state.
_CHANGES = {
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge"),
}
_PROPERTIES = {
    "Heatable": "heatable",
    "Coolable": "coolable",
    "Cleanable": "cleanable",
    "Sliceable": "sliceable",
    "Toggleable": "toggleable",
}
#: Types that the domain uses without declaring them.
_TYPES_OF_DOMAIN = (("SinkBasin", "Microwave", "Fridge"), ("Knife", "ButterKnife"))


@dataclass(frozen=True)
class GameRequest:
    """Which game to make; `attempt` counts the tries for a game that the expert can solve."""

    split: str
    floor_plan: int
    task: str
    index: int
    seed: int
    target: str = ""  # only this kind of object ("SoapBar"); empty: any
    receptacle: str = ""  # only this kind of receptacle as its goal
    attempt: int = 0

    @property
    def trial(self) -> str:
        """The name of the game's innermost folder."""
        return f"trial_S{self.seed}_{self.index}"


@dataclass(frozen=True)
class MadeGame:
    """A game that may not be solvable."""

    request: GameRequest
    name: str  # the folder's name, "pick_and_place_simple-Mug-None-Desk-308"
    trajectory: dict[str, Any]
    game: dict[str, Any]


class CannotBeMade(ValueError):
    """The floor plan lacks what a game of the task needs."""


def requests(
    split: str,
    per_task: int,
    seed: int,
    tasks: Sequence[str] = (),
    floor_plans: Sequence[int] = (),
    target: str = "",
    receptacle: str = "",
) -> Iterator[GameRequest]:
    """`per_task` games for every floor plan of a split ("train", "seen", "unseen") and every task its room allows."""
    for plan in floor_plans or FLOOR_PLANS:
        if (plan in UNSEEN_FLOOR_PLANS) != (split == "unseen"):
            continue
        for task in tasks or TASKS:
            if room_of(plan) in TASK_ROOMS[task]:
                for index in range(per_task):
                    yield GameRequest(split, plan, task, index, seed, target, receptacle)


def make_game(request: GameRequest) -> MadeGame:
    """Make the game of a request; the same request gives the same game. Raises `CannotBeMade`."""
    tables = _tables()
    rng = random.Random(
        f"{request.seed} {request.split} {request.floor_plan} {request.task} {request.index} {request.attempt}"
    )
    plan = _floor_plan(request.floor_plan)
    target, receptacle, lamp = _choose(request, plan, tables, rng)
    room = _Room(plan, tables, rng)
    for _ in range(2 if request.task == "pick_two_obj_and_place" else 1):
        room.place(target, avoid=receptacle)
    if lamp:
        room.place(lamp)
    pool = [kind for kind in plan.kinds if kind != target and room.places_for(kind)]
    for _ in range(min(rng.randint(*_DISTRACTORS), _MOST_OF_A_KIND * len(pool))):
        kind = rng.choice(pool)
        if room.count(kind) < _MOST_OF_A_KIND:
            room.place(kind)
    goal = tables.goals[request.task]
    sentence = rng.choice(goal["templates"]).format(
        obj=target.lower(), recep=receptacle.lower(), toggle=lamp.lower(), mrecep=""
    )
    problem = room.problem() + goal["pddl"].format(obj=target, recep=receptacle, toggle=lamp).replace("#", "-")
    trajectory = {
        "task_type": request.task,
        "task_id": request.trial,
        "scene": {"floor_plan": f"FloorPlan{request.floor_plan}", "scene_num": request.floor_plan},
        "pddl_params": {
            "object_target": target,
            "parent_target": receptacle,
            "toggle_target": lamp,
            "mrecep_target": "",
            "object_sliced": False,
        },
        "turk_annotations": {"anns": []},
        "made_by": {"seed": request.seed, "index": request.index, "attempt": request.attempt},
    }
    game = {
        "pddl_domain": shipped_text("alfred.pddl"),
        "grammar": shipped_text("alfred.twl2").replace("UNKNOWN GOAL", sentence),
        "pddl_problem": problem,
    }
    name = f"{request.task}-{target}-None-{receptacle or lamp}-{request.floor_plan}"
    return MadeGame(request, name, trajectory, game)


@dataclass(frozen=True)
class _FloorPlan:
    receptacles: dict[str, str]  # id -> PDDL location in front of it
    kinds: tuple[str, ...]  # of the movable things found in the room
    lamps: tuple[str, ...]


@dataclass(frozen=True)
class _Tables:
    fits: dict[str, set[str]]  # receptacle kind -> kinds that it holds
    properties: dict[str, set[str]]  # "Heatable" -> kinds
    openable: frozenset[str]
    fixed: frozenset[str]  # receptacle kinds that are not movable
    objects: frozenset[str]
    goals: dict[str, dict[str, Any]]


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    import_engine()
    from alfworld.gen import constants, goal_library

    return _Tables(
        constants.VAL_RECEPTACLE_OBJECTS,
        constants.VAL_ACTION_OBJECTS,
        frozenset(constants.OPENABLE_CLASS_LIST),
        frozenset(constants.RECEPTACLES) - constants.MOVABLE_RECEPTACLES_SET,
        frozenset(constants.OBJECTS_SET),
        goal_library.gdict,
    )


@lru_cache(maxsize=8)
def _floor_plan(number: int) -> _FloorPlan:
    tables = _tables()
    layouts = files("alfworld") / "gen" / "layouts"
    places = json.loads((layouts / f"FloorPlan{number}-openable.json").read_text())
    kinds = json.loads((layouts / f"FloorPlan{number}-objects.json").read_text())
    receptacles = {}
    for name in sorted(places):
        if _kind(name) in tables.fixed:
            x, z, rotation, horizon = places[name]
            stand = f"loc|{round(x / 0.25)}|{round(z / 0.25)}|{int(rotation) // 90}|{int(horizon)}"
            receptacles[name] = _as_pddl(stand)
    movable = (set(kinds) & tables.objects) - tables.fixed - set(_LAMPS)
    return _FloorPlan(receptacles, tuple(sorted(movable)), tuple(sorted(set(kinds) & set(_LAMPS))))


def _choose(request: GameRequest, plan: _FloorPlan, tables: _Tables, rng: random.Random) -> tuple[str, str, str]:
    """(object, receptacle, lamp) of the task; "" if the task has none."""
    places = sorted({_kind(name) for name in plan.receptacles})
    held = {place: {kind for kind in plan.kinds if kind in tables.fits.get(place, ())} for place in places}
    if request.task == "look_at_obj_in_light":
        targets = sorted(kind for kind in set().union(*held.values()) if request.target in ("", kind))
        if not plan.lamps or not targets or not any(place in _LAMP_PLACES for place in places):
            raise CannotBeMade(f"FloorPlan{request.floor_plan} has no lamp or no place for one")
        return rng.choice(targets), "", rng.choice(plan.lamps)
    changeable, changer = _CHANGES.get(request.task, ("", ""))
    choices = [
        (kind, place)
        for place in places
        for kind in sorted(held[place])
        if place != changer
        and request.target in ("", kind)
        and request.receptacle in ("", place)
        and (not changer or (changer in places and kind in tables.properties[changeable]))
        # The object must start somewhere else.
        and any(kind in held[other] for other in places if other != place)
    ]
    if not choices:
        raise CannotBeMade(f"FloorPlan{request.floor_plan} has nothing for {request.task}")
    return (*rng.choice(choices), "")


class _Room:
    """A floor plan that is being filled with things."""

    def __init__(self, plan: _FloorPlan, tables: _Tables, rng: random.Random) -> None:
        self._plan, self._tables, self._rng = plan, tables, rng
        self._where: dict[str, str] = {}  # thing id -> receptacle id

    def places_for(self, kind: str, avoid: str = "") -> list[str]:
        """Receptacles for a kind of thing, except receptacles of the kind `avoid`."""
        if kind in _LAMPS:
            return [name for name in self._plan.receptacles if _kind(name) in _LAMP_PLACES]
        return [
            name
            for name in self._plan.receptacles
            if kind in self._tables.fits.get(_kind(name), ()) and _kind(name) != avoid
        ]

    def place(self, kind: str, avoid: str = "") -> None:
        receptacle = self._rng.choice(self.places_for(kind, avoid))
        x, _, z = receptacle.split("|")[1:4]
        while True:
            height, depth = self._rng.uniform(0, 2), float(z) + self._rng.uniform(-0.3, 0.3)
            thing = f"{kind}|{x}|{height:+06.2f}|{depth:+06.2f}"
            if thing not in self._where:
                self._where[thing] = receptacle
                return

    def count(self, kind: str) -> int:
        return sum(_kind(thing) == kind for thing in self._where)

    def problem(self) -> str:
        """The PDDL problem up to its goal; the goal's text closes it."""
        things, receptacles = sorted(self._where), sorted(self._plan.receptacles)
        kinds = sorted({_kind(thing) for thing in things})
        places = sorted({_kind(name) for name in receptacles})
        start = _as_pddl("loc|0|0|0|30") + "_start"
        stands = sorted({*self._plan.receptacles.values(), start})
        place_types, thing_types = _TYPES_OF_DOMAIN
        lines = ["(define (problem made)", "(:domain alfred)", "(:objects", "agent1 - agent"]
        lines += [f"{kind}Type - otype" for kind in sorted({*kinds, *thing_types})]
        lines += [f"{kind}Type - rtype" for kind in sorted({*places, *place_types})]
        lines += [f"{_as_pddl(thing)} - object" for thing in things]
        lines += [f"{_as_pddl(name)} - receptacle" for name in receptacles]
        lines += [f"{stand} - location" for stand in stands]
        lines += [")", "(:init", "(= (total-cost) 0)", f"(atLocation agent1 {start})"]
        for name in receptacles:
            lines.append(f"(receptacleType {_as_pddl(name)} {_kind(name)}Type)")
            lines.append(f"(receptacleAtLocation {_as_pddl(name)} {self._plan.receptacles[name]})")
            if _kind(name) in self._tables.openable:
                lines.append(f"(openable {_as_pddl(name)})")
        for thing in things:
            kind, name, receptacle = _kind(thing), _as_pddl(thing), self._where[thing]
            lines.append(f"(objectType {name} {kind}Type)")
            if kind not in _LAMPS:
                lines.append(f"(pickupable {name})")
            lines.append(f"(inReceptacle {name} {_as_pddl(receptacle)})")
            lines.append(f"(objectAtLocation {name} {self._plan.receptacles[receptacle]})")
            for table, predicate in _PROPERTIES.items():
                if kind in self._tables.properties[table]:
                    lines.append(f"({predicate} {name})")
        for place in places:
            fitting = self._tables.fits.get(place, ())
            lines += [f"(canContain {place}Type {kind}Type)" for kind in kinds if kind in fitting]
        lines.append(")")
        return "\n".join(lines)


def _kind(name: str) -> str:
    """The kind of an AI2-THOR id: "Sink|-00.60|+00.94|-02.20|SinkBasin" is a SinkBasin."""
    parts = name.split("|")
    return parts[4] if len(parts) == 5 else parts[0]


def _as_pddl(name: str) -> str:
    """An AI2-THOR id as a PDDL name, in the form of ALFWorld's planner and demangler."""
    for character, word in (("-", "minus"), ("|", "bar"), ("+", "plus"), (".", "dot"), (",", "comma")):
        name = name.replace(character, f"_{word}_")
    return name
