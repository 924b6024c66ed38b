"""A phone that keeps the drivers' contract passes every check; each with a fault fails the check that is made for it.

`tests/envs/android/test_drivers.py` asks the same of our own drivers.
"""

from __future__ import annotations

import re

import pytest

from envs.contract import check_driver
from envs.contract.driver_checks import DRIVER_CHECKS
from envs.contract.result import Broken
from tests.envs.contract import broken_phones as broken


def faults(phone: type[broken.Phone]) -> dict[str, str]:
    found = {}
    for name, check in DRIVER_CHECKS.items():
        try:
            check(phone())
        except Broken as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize(
    ("phone", "failing", "words"),
    [
        (broken.OneBuffer, "screenshot", "share memory: return a new array"),
        (broken.WidthFirst, "screenshot", r"= \(40, 20, 3\), as screen_size says, not uint8 \(20, 40, 3\)"),
        (broken.Dark, "screenshot", "of a single colour"),
        (broken.Wordless, "health", "one line of text, not ''"),
        (broken.OffTheEdge, "touches", r"tap\(\(1.0, 1.0\)\) raises IndexError.*broken_phones.py:\d+ in tap"),
        (broken.NoHome, "keys", r"key\('home'\) after .* of its pixels differ"),
        (broken.Ascii, "text", "raises UnicodeEncodeError"),
        (broken.Remembers, "reset", r"reset\(\) after a tap"),
        (broken.LostTargets, "inspect", "the target 'ok' is shown, but not on the screen"),
        (broken.ClosesOnce, "closes", r"the second close\(\) raises DeviceError"),
    ],
)
def test_each_fault_fails_its_check(phone: type[broken.Phone], failing: str, words: str) -> None:
    found = faults(phone)
    assert failing in found and re.search(words, found[failing]), found


def test_a_phone_without_a_fault_passes_in_a_process_of_its_own() -> None:
    assert faults(broken.Phone) == {}
    results = check_driver(f"{broken.__name__}:Phone")
    assert [(each.name, each.ok) for each in results] == [(name, True) for name in DRIVER_CHECKS]
    assert results[0].measured["width"] == 20
    (first, *_) = check_driver("envs.contract:NoSuchPhone", skip=list(DRIVER_CHECKS)[1:])
    assert not first.ok and "cannot be opened" in first.message
