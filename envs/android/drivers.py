"""The drivers by name. Each is imported on use, since they need different packages."""

from __future__ import annotations

import importlib
from typing import Any

from envs.android.device import Device

DRIVERS = {
    "browser": "envs.android.browser:BrowserPhone",
    "adb": "envs.android.adb:AdbPhone",
    "appium": "envs.android.appium:AppiumPhone",
    "emulator": "envs.android.fleet_client:FleetPhone",
}


def open_device(driver: str, options: dict[str, Any]) -> Device:
    """Open a phone; options: keyword arguments of the driver's class. `module:Class` names a custom driver.

    Raises ValueError for an unknown driver or wrong arguments.
    """
    return load(DRIVERS.get(driver, driver), "driver", DRIVERS)(**options)


def load(place: str, what: str, known: dict[str, str]) -> Any:
    """The class at `module:Class`. Raises ValueError that lists the known names if there is none."""
    module, colon, name = place.partition(":")
    try:
        if not colon:
            raise ImportError("no such name")
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} must be one of {', '.join(known)}, or module:Class; {place!r}: {error}") from error
