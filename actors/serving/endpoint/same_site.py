"""Whether an HTTP request to a server on this machine may come from a web page of somebody else.

A page that a user's browser shows may send requests to this machine (a cross-site request), or let its own host name
point here after it was loaded (DNS rebinding). Both show in the headers, which a page cannot set.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

_Message = MutableMapping[str, Any]


def refusal(host: str | None, origin: str | None, fetch_site: str | None, names: frozenset[str] | None) -> str | None:
    """Why a request is refused, or None.

    host, origin, fetch_site: its headers `Host`, `Origin` and `Sec-Fetch-Site`. names: host names of this server, None
    for one that programs of other machines know by names of their own: then only browsers, which send an origin, have
    to use an address. An address is always a name of the server, since only a name can be made to point elsewhere.
    """
    name = _host_name(f"//{host}") if host else None
    of_a_program = names is None and origin is None and fetch_site is None
    if name is None or not (of_a_program or name in (names or ()) or name == "localhost" or _is_address(name)):
        return "its host is not this server: use an address, or localhost"
    if origin is not None and urlsplit(origin).netloc.lower() != str(host).lower():
        return "it comes from a page of another site"
    if fetch_site not in (None, "none", "same-origin"):
        return "it comes from a page of another site"
    return None


class SameSiteOnly:
    """An ASGI application that answers 403 to requests of other sites' pages, and hands on all others."""

    def __init__(self, app: Callable[..., Awaitable[None]], names: frozenset[str] | None) -> None:
        """names: see `refusal`."""
        self._app = app
        self._names = names

    async def __call__(self, scope: _Message, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        reason = refusal(headers.get("host"), headers.get("origin"), headers.get("sec-fetch-site"), self._names)
        if reason is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = f"refused: {reason}\n".encode()
            length = (b"content-length", str(len(body)).encode())
            await send({"type": "http.response.start", "status": 403, "headers": [length]})
            await send({"type": "http.response.body", "body": body})


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
