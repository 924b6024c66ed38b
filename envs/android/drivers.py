"""The drivers by name, each imported when it is used: they need different packages."""

from __future__ import annotations

import importlib
from typing import Any, Literal, get_args

from envs.android.device import Device

Driver = Literal["browser", "adb"]
_CLASSES: dict[str, str] = {
    "browser": "envs.android.browser:BrowserPhone",
    "adb": "envs.android.adb:AdbPhone",
}


def open_device(driver: str, options: dict[str, Any]) -> Device:
    """A phone, with the keyword arguments of its driver's class. Raises ValueError for an unknown driver."""
    if driver not in _CLASSES:
        raise ValueError(f"driver must be one of {', '.join(get_args(Driver))}, not {driver!r}")
    module, _, name = _CLASSES[driver].partition(":")
    return getattr(importlib.import_module(module), name)(**options)
