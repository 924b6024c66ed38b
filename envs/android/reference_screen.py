"""A reference screen: shows whether a Chromium draws pages as the one that the project is tested with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from envs.android.browser import BrowserPhone, find_browser

#: The screen as it should be, drawn by `python -m tools.reference_screen`.
REFERENCE = Path(__file__).with_name("reference_screen.png")
SCREEN_SIZE = (160, 210)
#: The largest share of pixels that may differ by more than `_LEVELS`: versions of Chromium round edges differently.
_TOLERANCE, _LEVELS = 0.005, 48
#: Text in the kinds of font that MiniWoB++ and the phone ask for, and form controls, whose fonts a page does not set.
PAGE = """<!doctype html><meta charset="utf-8"><style>body { margin: 4px; font: 12px/1.2 Arial, sans-serif }
input, textarea, select { width: 70px }</style><body>Plain <b>bold</b> 0123456789<br>
<span style="font-family: Georgia, serif">Serif fjord</span> <code>code {}</code><br>
<span style="font-family: system-ui; font-weight: 300">Light ← ★ ✓</span><br>
<input value="input"> <button>Submit</button><br><select><option>Option</select> <input type="date"><br>
<textarea rows="2">text area</textarea> <input type="checkbox" checked style="width: auto"><h3>Heading</h3>"""


def draw_reference(browser: str | None = None) -> tuple[NDArray[np.uint8], str]:
    """The reference screen as a browser draws it, uint8 (210, 160, 3), and the browser's name and version.

    browser: path of a Chromium, None to search for one. Raises DeviceError if it does not start.
    """
    phone = BrowserPhone(browser, SCREEN_SIZE, mobile=False)
    try:
        phone.show_page(PAGE)
        return phone.screenshot(), phone.health().partition(":")[0]
    finally:
        phone.close()


def share_that_differs(screen: NDArray[np.uint8]) -> float:
    """The share of pixels of a screen, uint8 (210, 160, 3), that clearly differ from the reference."""
    reference = np.asarray(Image.open(REFERENCE).convert("RGB"), np.int16)
    return float((np.abs(reference - screen).max(axis=2) > _LEVELS).mean())


def other_screens(browser: str | None = None) -> str | None:
    """One line that names a browser whose screens differ from the reference, or None.

    browser: path of a Chromium, None to search for one. Raises DeviceError if it does not start.
    """
    screen, version = draw_reference(browser)
    share = share_that_differs(screen)
    if share <= _TOLERANCE:
        return None
    return (
        f"{find_browser(browser)} ({version}) draws {100 * share:.1f} % of the reference screen's pixels differently: "
        "a model that was trained with another browser sees other screens here"
    )
