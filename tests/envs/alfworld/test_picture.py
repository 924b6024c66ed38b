"""The drawing: the same for the same scene, and different, at the model's input size, for what matters."""

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from envs.alfworld.names import OBJECTS, RECEPTACLES, ROOMS
from envs.alfworld.picture import SIZE, blank_picture, draw_scene
from envs.alfworld.scene import STATES, Place, Scene, Thing

#: The small model's input, pixels; and the least that two pictures must differ by there, mean over pixels of 0..255.
MODEL_PX = 64
TELLING = 0.4


def scene(place: str = "desk 1", is_open: bool | None = None, things: tuple[Thing, ...] = (), **other: object) -> Scene:
    values = {"room": "bedroom", "held": None, "all_places": ("desk 1",), **other}
    return Scene(places=(Place(place, is_open, things),), **values)  # type: ignore[arg-type]


def as_seen(view: Scene) -> np.ndarray:
    image = Image.fromarray(draw_scene(view)).resize((MODEL_PX, MODEL_PX), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32)


def difference(one: Scene, other: Scene) -> float:
    return float(np.abs(as_seen(one) - as_seen(other)).mean())


def test_shape_and_reading_only() -> None:
    picture = draw_scene(scene())
    assert picture.shape == blank_picture().shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
    assert not picture.flags.writeable
    # vLLM takes a picture of one colour for padding.
    assert len(np.unique(blank_picture())) > 1


@pytest.mark.parametrize("where", ["held", "seen"])
def test_every_kind_of_thing_looks_its_own(where: str) -> None:
    """Without their names, which a small model cannot read: all numbers are the same and of one length."""
    pictures = {}
    for kind in OBJECTS:
        thing = Thing(f"{kind} 1")
        view = scene(held=thing) if where == "held" else scene(things=(thing,))
        pictures[kind] = as_seen(view)
    closest = min(np.abs(pictures[one] - pictures[other]).mean() for one, other in combinations(OBJECTS, 2))
    assert closest > TELLING


def test_every_kind_of_receptacle_looks_its_own() -> None:
    pictures = [as_seen(scene(f"{kind} 1")) for kind in RECEPTACLES]
    assert min(np.abs(one - other).mean() for one, other in combinations(pictures, 2)) > TELLING


def test_open_and_shut_and_rooms_and_states_differ() -> None:
    assert difference(scene("drawer 1", True), scene("drawer 1", False)) > 10
    for one, other in combinations(ROOMS, 2):
        assert difference(scene(room=one), scene(room=other)) > TELLING
    for one, other in combinations([(), *((state,) for state in STATES), ("clean", "hot")], 2):
        held = [scene(held=Thing("apple 1", states)) for states in (one, other)]
        assert difference(*held) > TELLING, (one, other)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 9, 16, 40])
def test_any_number_of_things_fits(count: int) -> None:
    things = tuple(Thing(f"{OBJECTS[i % len(OBJECTS)]} {i}", ("clean", "hot")) for i in range(count))
    assert draw_scene(scene(things=things)).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("count", [0, 2, 3, 7])
def test_any_number_of_places_fits(count: int) -> None:
    places = tuple(Place(f"drawer {i}", i % 2 == 0, (Thing("pen 1"),)) for i in range(count))
    draw_scene(Scene("kitchen", places, Thing("gadget 1"), tuple(f"shelf {i}" for i in range(40))))


def test_the_same_pixels_in_another_process() -> None:
    code = (
        "import hashlib; from tests.envs.alfworld.test_picture import *; "
        "print(hashlib.sha256(draw_scene(scene(things=(Thing('apple 1', ('hot',)),)))).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1
