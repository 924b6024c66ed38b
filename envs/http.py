"""Reads answers of servers that may be slow, endless or cut off."""

from __future__ import annotations

import http.client
import time
import urllib.error
from typing import Any


def refusal(error: urllib.error.HTTPError, size: int) -> bytes:
    """Up to `size` bytes of the answer, whose end the server may have failed to send; closes the connection."""
    with error:
        try:
            return error.read(size)
        except http.client.IncompleteRead as cut:
            return cut.partial
        except (OSError, http.client.HTTPException):
            return b"(an answer that was cut off)"


def read_within(response: Any, deadline_s: float, most: int) -> bytes:
    """The whole body, of at most `most` bytes, within the deadline. Raises `TimeoutError`.

    The socket's own timeout is of each read, so a slow sender could avoid it."""
    ends = time.monotonic() + deadline_s
    body = bytearray()
    while part := response.read1(1 << 16):
        body += part
        if time.monotonic() > ends or len(body) > most:
            raise TimeoutError(f"the answer was incomplete after {deadline_s:g} s and {len(body)} bytes")
    return bytes(body)
