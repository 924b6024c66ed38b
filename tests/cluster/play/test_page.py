"""The page of `coso play`: what it shows, what it takes, and that nobody else can reach it."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import CosoError
from cluster.play.page import PlayPage, opened_page
from cluster.play.session import play
from envs.android.browser import missing_for_browser


@pytest.fixture
def page() -> Iterator[PlayPage]:
    page = PlayPage(by_hand=True)
    yield page
    page.close()


def get(page: PlayPage, name: str = "") -> bytes:
    with urllib.request.urlopen(page.url + name, timeout=20) as response:
        return response.read()


def post(page: PlayPage, line: str) -> None:
    urllib.request.urlopen(page.url + "answer", line.encode(), timeout=20).close()


def state(page: PlayPage, known: int = -1) -> dict[str, Any]:
    return json.loads(get(page, f"state?{known}"))


def test_the_page_shows_the_latest_screen(page: PlayPage) -> None:
    assert b"<title>coso play</title>" in get(page)
    page.show(np.zeros((4, 3, 3), np.uint8), "Do it", "first")
    page.show(np.full((4, 3, 3), 9, np.uint8), "Do it", "second", over=True)
    shown = state(page, known=1)
    assert (shown["number"], shown["prompt"], shown["lines"], shown["over"]) == (2, "Do it", ["first", "second"], True)
    assert get(page, "screen.png").startswith(b"\x89PNG")


def test_answers_come_in_their_order(page: PlayPage) -> None:
    for line in ("tap 1 2", "type <b>&é"):
        post(page, line)
    assert [page.read(), page.read()] == ["tap 1 2", "type <b>&é"]


def test_without_the_secret_there_is_nothing(page: PlayPage) -> None:
    stranger = page.url.rsplit("/", 2)[0] + "/"
    for url, data in ((stranger, None), (stranger + "state", None), (stranger + "answer", b"home")):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url, data, timeout=20)
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(page.url + "answer", b"x" * 30_000, timeout=20)


def test_a_page_to_watch_takes_no_answers() -> None:
    watching = PlayPage(by_hand=False)
    try:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            post(watching, "home")
    finally:
        watching.close()


def test_a_port_that_is_taken_is_named(page: PlayPage) -> None:
    taken = int(page.url.split(":")[2].split("/")[0])
    with pytest.raises(CosoError, match=f"port {taken}"), opened_page(taken, by_hand=True):
        pass


@pytest.mark.integration
def test_a_person_drives_a_phone_from_the_page(page: PlayPage, tmp_path: Path) -> None:
    if reason := missing_for_browser():
        pytest.skip(reason)
    played: list[Any] = []
    game = threading.Thread(
        target=lambda: played.extend(
            play("coso/Android-v0", {"only": ["open_app/settings"], "split": "train"}, page=page, frames_dir=tmp_path)
        )
    )
    game.start()
    assert "Open the Settings app" in state(page, known=0)["prompt"]
    post(page, "back")
    assert "PRESS_BACK" in state(page, known=1)["lines"][0]
    post(page, "tap 500 560")
    last = state(page, known=2)
    game.join(60)
    assert last["over"] and [(episode.steps, episode.success) for episode in played] == [(2, True)]
    assert len(list(tmp_path.glob("*.png"))) == 3
