"""The page of `coso play --page`: the live screen in a web browser, on loopback, to watch or to play by hand.

On phones, taps and swipes on the picture, keys and typed text become utterances. A line of text is an answer, as in
the terminal. Every address contains a secret of the session, and requests that come from pages of other sites, or for
another host, are refused, so that no other page in the browser can reach it.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actors.serving.endpoint.same_site import refusal
from cluster.errors import CosoError

_LONGEST_LINE = 20_000
_POLL_S = 0.5
#: Time between two steps on the page when an agent plays and a person watches, seconds.
_WATCHING_PAUSE_S = 1.0


@dataclass
class _Shown:
    """The current content of the page."""

    number: int = 0
    png: bytes = b""
    prompt: str = ""
    lines: list[str] = field(default_factory=list)
    over: bool = False


class PlayPage:
    """Serves the page from construction until `close`; `url` is its address."""

    def __init__(self, by_hand: bool, port: int = 0) -> None:
        """by_hand: whether the page sends answers; port: 0 takes a free one. Raises OSError if the port is taken."""
        self._secret = secrets.token_urlsafe(16)
        self._by_hand = by_hand
        self._shown = _Shown()
        self._changed = threading.Condition()
        self._answers: queue.Queue[str] = queue.Queue()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="play page", daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/{self._secret}/"

    def show(self, image: NDArray[np.uint8], prompt: str, line: str = "", over: bool = False) -> None:
        """Show a screen uint8 (H, W, 3) and its prompt, and add a line to the history."""
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        with self._changed:
            lines = [*self._shown.lines, line] if line else self._shown.lines
            self._shown = _Shown(self._shown.number + 1, buffer.getvalue(), prompt, lines[-200:], over)
            self._changed.notify_all()
        if not self._by_hand:
            time.sleep(_WATCHING_PAUSE_S)

    def read(self) -> str:
        """Wait for the next answer from the page; Ctrl-C interrupts the wait."""
        while True:
            try:
                return self._answers.get(timeout=_POLL_S)
            except queue.Empty:
                continue

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> tuple[str, bytes] | None:
        """(content type, body) for a GET request, or None if there is no such path."""
        path, _, query = path.partition("?")
        name = self._name(path)
        if name == "":
            return "text/html; charset=utf-8", _page()
        if name == "screen.png":
            return "image/png", self._shown.png
        if name == "state":
            known = int(query) if query.isdigit() else -1
            with self._changed:
                self._changed.wait_for(lambda: self._shown.number > known, timeout=10.0)
                shown = self._shown
            state = {"number": shown.number, "prompt": shown.prompt, "lines": shown.lines, "over": shown.over}
            return "application/json", json.dumps({**state, "by_hand": self._by_hand}).encode()
        return None

    def take(self, path: str, body: bytes) -> bool:
        """Accept a posted answer; returns False if the path is not this page's."""
        if self._name(path) != "answer" or not self._by_hand:
            return False
        self._answers.put(body.decode("utf-8", "replace"))
        return True

    @property
    def policy(self) -> str:
        """The page's content security policy: its own script and style, its pictures and requests, and nothing else."""
        script = re.search(rb"<script>(.*)</script>", _page(), re.DOTALL)
        assert script is not None
        digest = base64.b64encode(hashlib.sha256(script[1]).digest()).decode()
        return (
            f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src 'self'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def _name(self, path: str) -> str | None:
        """What a path names below the secret, or None."""
        prefix = f"/{self._secret}/".encode()
        begins, rest = path.encode()[: len(prefix)], path[len(prefix) :]
        return rest if secrets.compare_digest(begins, prefix) else None


@contextmanager
def opened_page(port: int | None, by_hand: bool) -> Iterator[PlayPage | None]:
    """Serve a page during the block, and then until Enter in a terminal; yields None if `port` is None.

    Raises CosoError if the port is taken.
    """
    if port is None:
        yield None
        return
    try:
        page = PlayPage(by_hand, port)
    except OSError as error:
        raise CosoError(f"cannot serve a page on port {port}: {error.strerror or error}") from error
    print(f"the screen is at {page.url}", flush=True)
    try:
        yield page
        if sys.stdin.isatty():
            input("Enter closes the page. ")
    finally:
        page.close()


def _page() -> bytes:
    return resources.files("cluster.play").joinpath("page.html").read_bytes()


def _handler(page: PlayPage) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 60

        def do_GET(self) -> None:
            if not self._is_of_another_site():
                self._reply(page.answer(self.path))

        def do_POST(self) -> None:
            if self._is_of_another_site():
                return
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > _LONGEST_LINE:
                self.send_error(413)
                return
            taken = page.take(self.path, self.rfile.read(int(length)))
            self._reply(("text/plain", b"") if taken else None)

        def _is_of_another_site(self) -> bool:
            host, origin, site = (self.headers.get(name) for name in ("Host", "Origin", "Sec-Fetch-Site"))
            if reason := refusal(host, origin, site, frozenset()):
                self.send_error(403, explain=reason)
            return reason is not None

        def _reply(self, answer: tuple[str, bytes] | None) -> None:
            if answer is None:
                self.send_error(404)
                return
            self.send_response(200)
            headers: dict[str, Any] = {
                "Content-Type": answer[0],
                "Content-Length": len(answer[1]),
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "Content-Security-Policy": page.policy,
                "X-Content-Type-Options": "nosniff",
                "Cross-Origin-Resource-Policy": "same-origin",
            }
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
