"""The checks of a driver of phones, in order. Each takes an open phone (`envs.android.device.Device`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.android.device import Device, DeviceError, Start
from envs.contract.player import described, shown
from envs.contract.result import Broken, Passed

#: What an agent may type: quotes, shell syntax, `input text`'s own escape, every plane of Unicode, half a character.
TEXTS = (
    "",
    "plain words",
    'it\'s "quoted" `twice`',
    "$(reboot) ; rm -rf / && echo $HOME | cat > x",
    "100%s %%s %d \\n \\",
    "żółw Ωμέγα 日本語 한국어 العربية é",
    "😀👩‍👩‍👧🏳️‍🌈 𝄞",
    "<b>&amp;</b> --flag -x",
    "half a character: \ud83d",
)
CORNERS = ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
#: Share of pixels in which two screens of the same state may differ: a clock, a caret.
SAME_SCREEN = 0.02


def screenshot(device: Device) -> Passed:
    """A screenshot is an RGB picture of the screen's size, and belongs to whoever asked for it."""
    device.reset(Start())
    begun = time.perf_counter()
    first = _screen(device)
    seconds = time.perf_counter() - begun
    if len(np.unique(first.reshape(-1, 3), axis=0)) < 2:
        raise Broken("screenshot() is of a single colour: the screen is off, or the picture is not decoded")
    before = first.copy()
    second = device.screenshot()
    if not second.flags.writeable:
        raise Broken("screenshot() returned an array that cannot be written to: return a copy")
    second[:] = 0
    if (first != before).any():
        raise Broken("two screenshots share memory: return a new array from each call")
    return Passed({"screenshot_ms": 1000 * seconds, "width": first.shape[1], "height": first.shape[0]})


def health(device: Device) -> Passed:
    """`health` describes the phone in one line."""
    said = device.health()
    if not isinstance(said, str) or not said.strip() or "\n" in said:
        raise Broken(f"health() must return one line of text, not {shown(said)}")
    return Passed(note=said)


def touches(device: Device) -> Passed:
    """Taps and swipes reach every edge of the screen."""
    for corner in CORNERS:
        _allowed(f"tap({corner})", lambda corner=corner: device.tap(corner))  # type: ignore[misc]
    for touch, lift in ((CORNERS[1], CORNERS[0]), (CORNERS[2], CORNERS[3])):
        _allowed(f"swipe({touch}, {lift})", lambda ends=(touch, lift): device.swipe(*ends))  # type: ignore[misc]
    _allowed("swipe(…, duration_s=0.5)", lambda: device.swipe((0.5, 0.7), (0.5, 0.3), duration_s=0.5))
    _screen(device)
    return Passed()


def keys(device: Device) -> Passed:
    """Back, home and enter can be pressed; home leads to the same screen from anywhere."""
    device.reset(Start())
    _allowed("key('home')", lambda: device.key("home"))
    home = _screen(device)
    device.tap((0.5, 0.56))
    for key in ("enter", "back", "home"):
        _allowed(f"key({key!r})", lambda key=key: device.key(key))  # type: ignore[misc]
    _same(home, _screen(device), "key('home') after a tap, enter and back shows another screen than before")
    return Passed()


def text(device: Device) -> Passed:
    """Any text can be typed, also where no field has the focus."""
    for each in TEXTS:
        _allowed(f"text({shown(each)})", lambda each=each: device.text(each))  # type: ignore[misc]
    return Passed()


def reset(device: Device) -> Passed:
    """A reset begins at the same screen, whatever was done before."""
    begun = time.perf_counter()
    _allowed("reset(Start())", lambda: device.reset(Start()))
    seconds = time.perf_counter() - begun
    first = _screen(device)
    device.tap((0.25, 0.5))
    device.swipe((0.5, 0.8), (0.5, 0.3))
    device.text("left behind")
    device.reset(Start())
    _same(first, _screen(device), "reset() after a tap, a swipe and text shows another screen than before")
    return Passed({"reset_ms": 1000 * seconds})


def inspect(device: Device) -> Passed:
    """A phone that reports its state reports where its targets are."""
    if not hasattr(device, "inspect"):
        return Passed(note="no inspect, which only the evaluator 'state' and the expert need")
    device.reset(Start())
    seen: dict[str, Any] = device.inspect()
    if (
        not isinstance(seen, dict)
        or not isinstance(seen.get("state"), dict)
        or not isinstance(seen.get("targets"), list)
    ):
        raise Broken(f"inspect() must return {{'state': {{…}}, 'targets': […]}}, not {shown(seen)}")
    for target in seen["targets"]:
        if not {"id", "x", "y", "shown"} <= set(target):
            raise Broken(f"a target of inspect() must have id, x, y and shown; this one is {target}")
        if target["shown"] and not (0 <= target["x"] <= 1 and 0 <= target["y"] <= 1):
            raise Broken(f"the target {target['id']!r} is shown, but not on the screen: {target}")
    return Passed({"targets": len(seen["targets"])})


def closes(device: Device) -> Passed:
    """`close` never raises, also twice; what comes after it works or is a `DeviceError`."""
    for number in ("first", "second"):
        try:
            device.close()
        except Exception as error:
            raise Broken(f"the {number} close() raises {described(error)}; it must never raise") from error
    try:
        device.tap((0.5, 0.5))
    except DeviceError:
        pass
    except Exception as error:
        raise Broken(f"tap() after close() raises {described(error)}, it must be a DeviceError") from error
    return Passed()


DRIVER_CHECKS: dict[str, Callable[[Device], Passed]] = {
    check.__name__: check for check in (screenshot, health, touches, keys, text, reset, inspect, closes)
}


def _screen(device: Device) -> NDArray[np.uint8]:
    picture: Any = device.screenshot()
    size = device.screen_size
    if not isinstance(size, tuple) or len(size) != 2 or min(size) < 1:
        raise Broken(f"screen_size must be (width, height) in pixels, not {shown(size)}")
    expected = (size[1], size[0], 3)
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape != expected:
        form = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else shown(picture)
        raise Broken(f"screenshot() must be uint8 (height, width, 3) = {expected}, as screen_size says, not {form}")
    return picture


def _allowed(call: str, action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:
        raise Broken(f"{call} raises {described(error)}; a phone that works takes this call") from error


def _same(first: NDArray[np.uint8], second: NDArray[np.uint8], otherwise: str) -> None:
    if first.shape != second.shape:
        raise Broken(f"{otherwise}: {second.shape} instead of {first.shape}")
    share = float((first != second).any(axis=2).mean())
    if share > SAME_SCREEN:
        raise Broken(f"{otherwise}: {share:.0%} of its pixels differ")
