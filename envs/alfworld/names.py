"""Names in ALFWorld: rooms, tasks, verbs, kinds of things, and the floor plans of each split."""

from __future__ import annotations

ROOMS = ("kitchen", "livingroom", "bedroom", "bathroom")
_FIRST_PLAN = {"kitchen": 1, "livingroom": 201, "bedroom": 301, "bathroom": 401}
FLOOR_PLANS: tuple[int, ...] = tuple(first + i for first in _FIRST_PLAN.values() for i in range(30))
"""All 120 floor plans of AI2-THOR 1 and 2."""

UNSEEN_FLOOR_PLANS = frozenset({10, 219, 308, 424, 9, 29, 215, 226, 315, 325, 404, 425})
"""Held out from training: the four of the published `valid_unseen` and the eight of the published (hidden) test set."""

SPLITS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}
"""Name of a split here -> its folder in the published data set."""

TASKS = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
"""The six task types, in the order of the published numbers 1 to 6."""

TASK_ROOMS = {
    "pick_and_place_simple": ROOMS,
    "look_at_obj_in_light": ("livingroom", "bedroom"),
    "pick_clean_then_place_in_recep": ("kitchen", "bathroom"),
    "pick_heat_then_place_in_recep": ("kitchen",),
    "pick_cool_then_place_in_recep": ("kitchen",),
    "pick_two_obj_and_place": ROOMS,
}

VERBS = (
    "go",
    "open",
    "close",
    "take",
    "move",
    "use",
    "heat",
    "cool",
    "clean",
    "slice",
    "examine",
    "look",
    "inventory",
    "help",
)

RECEPTACLES = (
    "armchair",
    "bathtubbasin",
    "bed",
    "cabinet",
    "cart",
    "coffeemachine",
    "coffeetable",
    "countertop",
    "desk",
    "diningtable",
    "drawer",
    "dresser",
    "fridge",
    "garbagecan",
    "handtowelholder",
    "laundryhamper",
    "microwave",
    "ottoman",
    "paintinghanger",
    "safe",
    "shelf",
    "sidetable",
    "sinkbasin",
    "sofa",
    "stoveburner",
    "toaster",
    "toilet",
    "toiletpaperhanger",
    "towelholder",
    "tvstand",
)
"""Kinds of things that hold others and that one can go to."""

OBJECTS = (
    "alarmclock",
    "apple",
    "baseballbat",
    "basketball",
    "blinds",
    "book",
    "boots",
    "bowl",
    "box",
    "bread",
    "butterknife",
    "candle",
    "cd",
    "cellphone",
    "chair",
    "cloth",
    "creditcard",
    "cup",
    "curtains",
    "desklamp",
    "dishsponge",
    "egg",
    "floorlamp",
    "footstool",
    "fork",
    "glassbottle",
    "handtowel",
    "houseplant",
    "kettle",
    "keychain",
    "knife",
    "ladle",
    "laptop",
    "laundryhamperlid",
    "lettuce",
    "lightswitch",
    "mirror",
    "mug",
    "newspaper",
    "painting",
    "pan",
    "papertowel",
    "papertowelroll",
    "pen",
    "pencil",
    "peppershaker",
    "pillow",
    "plate",
    "plunger",
    "poster",
    "pot",
    "potato",
    "remotecontrol",
    "saltshaker",
    "scrubbrush",
    "showerdoor",
    "showerglass",
    "sink",
    "soapbar",
    "soapbottle",
    "spatula",
    "spoon",
    "spraybottle",
    "statue",
    "stoveknob",
    "teddybear",
    "television",
    "tennisracket",
    "tissuebox",
    "toiletpaper",
    "toiletpaperroll",
    "tomato",
    "towel",
    "vase",
    "watch",
    "wateringcan",
    "window",
    "winebottle",
    "bathtub",
)
"""Kinds of things that are found in or on receptacles."""


def room_of(floor_plan: int) -> str:
    """The kind of room of a floor plan. Raises ValueError if there is no such plan."""
    for room, first in _FIRST_PLAN.items():
        if first <= floor_plan < first + 30:
            return room
    raise ValueError(f"there is no floor plan {floor_plan}; they are 1-30, 201-230, 301-330 and 401-430")


def kind_of(name: str) -> str:
    """ "apple 2" -> "apple"."""
    return name.split(" ", 1)[0]
