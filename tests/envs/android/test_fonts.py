"""The fonts in the picture are those that ship with the project, whatever fonts a machine has."""

import hashlib
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import matplotlib
import numpy as np
import pytest
from PIL import Image

import envs  # noqa: F401  (registers coso/...)
from cluster.config.files import load_config
from cluster.launch.preflight import browser_warning
from envs.android.browser import OWNER_VARIABLE, BrowserPhone, find_browser
from envs.android.device import Start
from envs.android.phone.content import initial_state
from envs.android.reference_screen import REFERENCE, draw_reference, other_screens, share_that_differs
from envs.drawing import FONTS

#: SHA-256 of the screens below, drawn by the Chromium that drew the reference screen.
SCREENS = "c6cb5b94f9bd4d1a1bb865887d927e66dd355df789f39e858a4cde9fd0b7f06d"
#: SHA-256 of the first pictures of the card games and of the number line.
GAMES = "4ed2819895ae926816cb790b829cb03d7efdcb4e328251a1ba6df269d3dcf113"
#: Font files that other machines might have instead; matplotlib brings them, so that every machine has them here.
OTHERS = {"none": (), "others": ("STIX*.ttf", "cm*.ttf", "DejaVuSerif*.ttf")}


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A browser of the test's own: one that already runs would keep the fonts it started with."""
    with subprocess.Popen(["sleep", "600"]) as process:
        monkeypatch.setenv(OWNER_VARIABLE, str(process.pid))
        yield
        process.kill()


def offer_fonts(patterns: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fontconfig offer these of matplotlib's fonts and no others."""
    for pattern in patterns:
        for path in (Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob(pattern):
            shutil.copy(path, folder)
    config = folder / "fonts.conf"
    config.write_text(f"<fontconfig><dir>{folder}</dir><cachedir>{folder}/cache</cachedir></fontconfig>")
    monkeypatch.setenv("FONTCONFIG_FILE", str(config))


def screens() -> dict[str, Any]:
    """Screens of a phone, and of MiniWoB++ pages with text, a dialog and form controls."""
    seen = {"reference": draw_reference()[0]}
    phone = BrowserPhone()
    phone.reset(Start(initial_state(3)))
    seen["launcher"] = phone.screenshot()
    phone.tap((0.5, 0.56))
    seen["settings"] = phone.screenshot()
    phone.close()
    if importlib.util.find_spec("miniwob"):
        page = BrowserPhone(screen_size=(160, 210), mobile=False)
        for name in ("navigate-tree", "click-dialog", "login-user", "click-option"):
            page.reset(Start(page=name, seed=1))
            seen[name] = page.screenshot()
        page.close()
    return seen


@pytest.fixture(scope="module")
def seen_here(needs_browser: None) -> dict[str, Any]:
    return screens()


@pytest.mark.parametrize("fonts", OTHERS)
def test_screens_are_the_same_whatever_fonts_a_machine_has(
    seen_here: dict[str, Any], fonts: str, owner: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fonts(OTHERS[fonts], tmp_path, monkeypatch)
    for name, screen in screens().items():
        assert (screen == seen_here[name]).all(), f"{name} looks different"


def test_screens_are_the_reference_ones(seen_here: dict[str, Any]) -> None:
    assert share_that_differs(seen_here["reference"]) <= 0.005 and other_screens() is None
    if draw_reference()[1] != Image.open(REFERENCE).info["Software"] or not importlib.util.find_spec("miniwob"):
        pytest.skip("exact bytes are those of one version of Chromium, and of MiniWoB++ pages")
    assert hash_of(seen_here.values()) == SCREENS


def test_a_browser_with_another_font_is_named(
    needs_browser: None, owner: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A wrapper around the browser, as some packages have it, sets its own fonts.
    offer_fonts(("STIXGeneral*.ttf",), tmp_path, monkeypatch)
    wrapper = tmp_path / "wrapped-chromium"
    wrapper.write_text(f'#!/bin/sh\nFONTCONFIG_FILE="{tmp_path}/fonts.conf" exec "{find_browser()}" "$@"\n')
    wrapper.chmod(0o755)
    config = load_config([], ["environment.id=coso/Android-v0", f"environment.kwargs.device.browser={wrapper}"])
    warning = browser_warning(config)
    assert warning is not None and str(wrapper) in warning and "%" in warning


def test_card_games_and_the_number_line_are_the_reference_ones() -> None:
    pictures = []
    for game in ("NumberLine", "Blackjack", "EZPoints", "Points24"):
        env = gymnasium.make(f"coso/{game}-v0")
        pictures.append(env.reset(seed=5)[0]["image"])
        env.close()
    assert hash_of(pictures) == GAMES


def test_the_fonts_ship_with_their_licence() -> None:
    licence = (FONTS / "LICENSE_DEJAVU").read_text()
    assert "to reproduce and distribute" in licence
    assert {path.name for path in FONTS.glob("*.ttf")} == {f"DejaVu{k}.ttf" for k in ("Sans", "Sans-Bold", "SansMono")}


def hash_of(pictures: Any) -> str:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(np.ascontiguousarray(picture).tobytes())
    return digest.hexdigest()
