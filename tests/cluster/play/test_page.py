"""The page of `coso play`: what it shows, what it takes, and that nobody else can reach it."""

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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


def raw(page: PlayPage, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
    """The response to a request with exactly these headers. `{secret}` in the path is the page's."""
    where = urlsplit(page.url)
    link = http.client.HTTPConnection(where.netloc, timeout=20)
    link.putrequest(method, path.replace("{secret}", where.path.strip("/")), skip_host=True, skip_accept_encoding=True)
    for name, value in {"Host": where.netloc, **headers}.items():
        link.putheader(name.replace("_", "-"), value)
    link.putheader("Content-Length", "4" if method == "POST" else "0")
    link.endheaders(b"home" if method == "POST" else b"")
    return link.getresponse()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # its name was made to point here
        {"Host": "127.0.0.1.evil.example", "Origin": "http://127.0.0.1.evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
    ],
)
def test_a_page_of_another_site_reaches_nothing_even_with_the_secret(page: PlayPage, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/{secret}/"), ("GET", "/{secret}/state"), ("POST", "/{secret}/answer")):
        assert raw(page, method, path, **headers).status == 403
    own = {"Origin": page.url.rsplit("/", 2)[0], "Sec_Fetch_Site": "same-origin"}
    assert raw(page, "POST", "/{secret}/answer", **own).status == 200
    assert page.read() == "home" and page._answers.empty()


@pytest.mark.parametrize(
    "path",
    [
        "/{secret}/../../../../etc/passwd",
        "/{secret}/%2e%2e/%2e%2e/etc/passwd",
        "/{secret}//etc/passwd",
        "/{secret}/page.py",
        "/{secret}/./",
        "/{secret}é/",
        "{secret}",
        "/",
        "*",
    ],
)
def test_no_path_leads_out_of_the_page(page: PlayPage, path: str) -> None:
    assert raw(page, "GET", path.replace("é", "%C3%A9")).status == 404
    assert raw(page, "POST", path.replace("é", "%C3%A9")).status == 404


@pytest.mark.integration
def test_a_browser_shows_the_page_and_runs_nothing_else(page: PlayPage, tmp_path: Path) -> None:
    """Its own script runs under its policy, and its answers arrive; a report shows pictures and runs no script."""
    if reason := missing_for_browser():
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    from cluster.report.page import write_report
    from envs.android.browser import find_browser

    page.show(np.full((4, 3, 3), 9, np.uint8), "Do it", "first")
    (tmp_path / "config.yaml").write_text("name: mine\n")
    report = write_report(tmp_path)
    # A hole in the escaping, as if one were found.
    hole = "<script>document.title = 'script'</script><img src=x onerror=\"document.title = 'handler'\">"
    report.write_text(report.read_text().replace("</main>", f"<p style='color: rgb(1, 2, 3)'>styled</p>{hole}</main>"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(page.url)
        tab.locator("#lines", has_text="first").wait_for()
        assert tab.locator("#screen").evaluate("async e => { await e.decode(); return e.naturalWidth }") == 3
        tab.locator("#line input").fill("tap 1 2")
        tab.locator("#line button").click()
        assert page.read() == "tap 1 2"
        tab.goto(report.as_uri())
        assert tab.title() == "mine – coso-rl"
        assert tab.locator("p", has_text="styled").evaluate("e => getComputedStyle(e).color") == "rgb(1, 2, 3)"
        browser.close()


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
