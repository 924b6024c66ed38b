"""Requests that a browser sends for pages of other sites are refused; those of programs and of the own page are not."""

import asyncio
from typing import Any

import pytest

from actors.serving.endpoint.same_site import SameSiteOnly, refusal

HERE = "127.0.0.1:8000"


@pytest.mark.parametrize("host", [HERE, "localhost:8000", "LOCALHOST", "[::1]:8000", "10.1.2.3"])
def test_programs_and_the_own_page_are_answered(host: str) -> None:
    assert refusal(host, None, None, frozenset()) is None
    assert refusal(host, f"http://{host}", "same-origin", frozenset()) is None
    assert refusal(host, None, "none", frozenset()) is None  # typed into the address bar


@pytest.mark.parametrize(
    ("host", "origin", "site"),
    [
        ("evil.example:8000", None, None),  # a name that was made to point here
        ("evil.example:8000", "http://evil.example:8000", "same-origin"),
        ("127.0.0.1.evil.example", None, None),
        ("localhost.evil.example", None, None),
        (None, None, None),
        ("", None, None),
        ("[", None, None),
        (HERE, "http://evil.example", None),
        (HERE, "http://localhost:3000", "same-site"),
        (HERE, "null", "cross-site"),
        (HERE, None, "cross-site"),
    ],
)
def test_pages_of_other_sites_are_not(host: str | None, origin: str | None, site: str | None) -> None:
    assert refusal(host, origin, site, frozenset())
    if origin or site or not host or host == "[":
        assert refusal(host, origin, site, None)


def test_a_server_for_other_machines_has_names_of_its_own() -> None:
    assert refusal("judge.internal:8000", None, None, None) is None
    assert refusal("evil.example:8000", "http://evil.example:8000", None, None)


def test_every_kind_of_request_passes_the_gate() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "through"})

    def answers(kind: str, host: bytes) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": kind, "headers": [(b"host", host)]}
        asyncio.run(SameSiteOnly(app, frozenset())(scope, None, send))
        return sent

    for kind in ("http", "websocket", "lifespan"):
        assert answers(kind, b"127.0.0.1")[0]["type"] == "through"
    assert answers("http", b"evil.example")[0]["status"] == 403
    assert answers("websocket", b"evil.example")[0] == {"type": "websocket.close", "code": 1008}
