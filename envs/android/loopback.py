"""Connections within this machine: HTTP that passes proxies by, and sockets of the same user only."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import urllib.request
from typing import Any
from urllib.parse import urlsplit

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine."""
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def open_url(request: urllib.request.Request, timeout_s: float) -> Any:
    """`urllib.request.urlopen`, past the environment's proxies where the server is on this machine.

    `http_proxy` is set for the whole machine, often without a `no_proxy`; a proxy then answers with its own 127.0.0.1.
    """
    if is_loopback(urlsplit(request.full_url).hostname or ""):
        return _DIRECT.open(request, timeout=timeout_s)
    return urllib.request.urlopen(request, timeout=timeout_s)


def is_of_this_user(link: Any) -> bool:
    """Whether the other end of a Unix socket is a process of this user. Any user can bind an abstract socket's name."""
    peer = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(peer)[1] == os.getuid())
