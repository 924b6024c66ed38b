"""What every driver must do alike. With `--serial SERIAL` the same tests run on a real device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from envs.android.adb import AdbPhone
from envs.android.appium import AppiumPhone
from envs.android.browser import BrowserPhone
from envs.android.device import Device, Start
from envs.android.phone.content import initial_state
from envs.contract.driver_checks import DRIVER_CHECKS, TEXTS
from envs.parsing import without_surrogates
from tests.envs.android.appium_stand_in import AppiumStandIn

pytestmark = pytest.mark.integration


@dataclass
class Driven:
    """A phone through one driver; `inspect` looks at the embedded phone past the driver, None on a real device."""

    device: Device
    inspect: Callable[[], dict[str, Any]] | None

    def at(self, target: str) -> tuple[float, float]:
        """Where a target is on the screen."""
        if self.inspect is None:
            pytest.skip("a real device does not tell where its buttons are")
        found = next(each for each in self.inspect()["targets"] if each["id"] == target)
        assert found["shown"], f"{target} is not on the screen"
        return found["x"], found["y"]

    def state(self) -> dict[str, Any]:
        if self.inspect is None:
            pytest.skip("a real device does not tell its state")
        return self.inspect()["state"]


@pytest.fixture(params=["browser", "adb-png", "adb-raw", "appium", "serial"])
def driven(request: pytest.FixtureRequest) -> Iterator[Driven]:
    if request.param == "serial":
        serial = request.config.getoption("--serial")
        if serial is None:
            pytest.skip("no real device: name one with --serial")
        phone = AdbPhone(serial)
        phone.reset(Start())
        yield Driven(phone, None)
        return
    if request.param == "browser":
        inside: BrowserPhone = request.getfixturevalue("browser_phone")
        inside.reset(Start(initial_state(3)))
        yield Driven(inside, inside.inspect)
        return
    if request.param == "appium":
        inside = request.getfixturevalue("browser_phone")
        stand_in = AppiumStandIn(inside, seed=3)
        appium = AppiumPhone("device", stand_in.url, clear_packages=["org.coso.phone"], frame_s=0.02)
        yield Driven(appium, inside.inspect)
        appium.close()
        stand_in.close()
        return
    over = request.getfixturevalue("embedded_over_adb")
    if request.param == "adb-raw":
        port = request.getfixturevalue("adb_port")
        options = {"clear_packages": ["org.coso.phone"], "frame_s": 0.02}
        over.phone = AdbPhone(over.device.serial, server_port=port, capture="raw", **options)
    over.phone.reset(Start())
    yield Driven(over.phone, over.inside.inspect)


def test_the_contract_of_drivers(driven: Driven) -> None:
    """What `envs.contract` asks of a driver, `closes` apart, since a phone is shared by tests."""
    for name, check in DRIVER_CHECKS.items():
        if name != "closes":
            check(driven.device)


def test_a_closed_phone_is_no_phone(needs_browser: None) -> None:
    DRIVER_CHECKS["closes"](BrowserPhone())


def test_a_screenshot_is_an_rgb_picture_of_the_screens_size(driven: Driven) -> None:
    picture = driven.device.screenshot()
    width, height = driven.device.screen_size
    assert picture.dtype == np.uint8 and picture.shape == (height, width, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50, "an empty screen"


def test_home_leads_to_the_same_screen_from_anywhere(driven: Driven) -> None:
    driven.device.key("home")
    home = driven.device.screenshot()
    driven.device.tap((0.5, 0.56))
    driven.device.key("home")
    # A real device has a clock in its status bar.
    assert (driven.device.screenshot() != home).any(axis=2).mean() < 0.02


def test_a_tap_opens_what_it_touches_and_back_leaves_it(driven: Driven) -> None:
    before = driven.device.screenshot()
    driven.device.tap(driven.at("open:contacts"))
    assert driven.state()["screen"]["app"] == "contacts"
    assert (driven.device.screenshot() != before).any()
    driven.device.key("back")
    assert driven.state()["screen"]["app"] == "launcher"


def test_a_swipe_scrolls_and_taps_nothing(driven: Driven) -> None:
    driven.device.tap(driven.at("open:browser"))
    driven.device.tap(driven.at("visit_site:amberly"))
    top = driven.device.screenshot()
    driven.device.swipe((0.5, 0.8), (0.5, 0.3))
    assert (driven.device.screenshot() != top).any(axis=2).mean() > 0.05
    assert driven.state()["screen"] == {"app": "browser", "site": "amberly", "page": "main"}
    driven.device.swipe((0.5, 0.3), (0.5, 0.9))
    assert (driven.device.screenshot() == top).all()


@pytest.mark.parametrize("text", [text for text in TEXTS if text and text == without_surrogates(text)])
def test_text_arrives_as_it_is(driven: Driven, text: str) -> None:
    driven.device.tap(driven.at("open:notes"))
    driven.device.tap(driven.at("new_note"))
    driven.device.tap(driven.at("field:note_title"))
    driven.device.text(text)
    assert driven.state()["fields"]["note_title"] == text


def test_text_without_a_field_to_go_to_changes_nothing(driven: Driven) -> None:
    before = driven.device.screenshot()
    driven.device.text("lost words")
    assert (driven.device.screenshot() != before).any(axis=2).mean() < 0.02


def test_enter_submits_a_field(driven: Driven) -> None:
    driven.device.tap(driven.at("open:maps"))
    driven.device.tap(driven.at("field:place"))
    driven.device.text("cafe")
    driven.device.key("enter")
    assert driven.state()["screen"] == {"app": "maps", "page": "results", "q": "cafe"}


def test_a_reset_leaves_nothing_of_what_was_done(driven: Driven) -> None:
    before = driven.device.screenshot()
    driven.device.tap(driven.at("open:settings"))
    driven.device.tap(driven.at("page:display"))
    driven.device.tap(driven.at("toggle:dark_mode"))
    driven.device.reset(Start(initial_state(3)))
    assert (driven.device.screenshot() == before).all()
    assert driven.state()["settings"]["dark_mode"] is False
