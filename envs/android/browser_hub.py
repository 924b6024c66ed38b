"""The hub: a process that owns the browser of one worker and serves one phone per connection.

Run as `python -m envs.android.browser_hub OWNER_PID BROWSER`. A Chromium per phone would cost a hundred megabytes and a
second each. Instead, each phone is an isolated mobile context of one browser, through Playwright. The first phone that
finds no hub starts one. A phone is closed with its connection, also if its environment is killed. The hub and its
browser end with the process that owns the worker's environments, or after `IDLE_S` seconds without a phone.

The hub listens on an abstract socket named after its owner. The socket is also a lock: a second hub cannot bind it and
exits. The hub answers only processes of the same user. A message is a 4-byte length and JSON; a reply is a 4-byte
length, a type byte ("j" JSON, "p" PNG, "e" error text) and the content.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, BrowserContext, CDPSession, Error, Page, async_playwright

from envs.android.browser import LENGTH, socket_name
from envs.android.loopback import is_of_this_user

#: Time without a phone after which the browser is closed, seconds.
IDLE_S = 3.0
_LAUNCH_DEADLINE_MS = 30_000
#: Deadlines of a call on a page and of closing it, seconds, so that a hanging page cannot block its phone or the hub.
_PAGE_DEADLINE_S = 15.0
_LARGEST_MESSAGE = 8 << 20
#: No downloads or reports. No sandbox, because Chromium refuses it in containers and as root. Software drawing, for the
#: same picture on every machine.
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    # A tap hits exactly its point, not an element near it.
    "--disable-touch-adjustment",
    "--force-color-profile=srgb",
    "--disable-lcd-text",
    "--js-flags=--max-lazy --lite-mode",
    "--renderer-process-limit=64",
)
_INSPECT = "() => phone.inspect()"
#: Wait two frames, after which changes are on the screen; a new page is blank before.
_DRAWN = "await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));"
_LOAD = f"async (state) => {{ phone.load(state); {_DRAWN} }}"
_KEY = "(name) => phone.key(name)"
#: MiniWoB++: start the page's episode with a seed and without its clock, which would fail slow machines. A dialog that
#: takes the focus while it is placed may scroll the page, so scroll back.
_MINIWOB_START = (
    "async (seed) => { Math.seedrandom(String(seed)); core.EPISODE_MAX_TIME = 1e9; core.startEpisodeReal(); "
    f"core.hideDisplay(); window.scrollTo(0, 0); {_DRAWN} return core.getUtterance(); }}"
)
_MINIWOB_OUTCOME = "() => ({done: WOB_DONE_GLOBAL, reward: WOB_RAW_REWARD_GLOBAL})"


class _Phone:
    """One phone: a browser context with one page."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._context: BrowserContext | None = None
        self._page: Page
        self._cdp: CDPSession
        self._shown = ""

    async def open(self, width: int, height: int, mobile: bool) -> None:
        self._context = await self._browser.new_context(
            viewport={"width": width, "height": height},
            device_scale_factor=1,
            is_mobile=mobile,
            has_touch=True,
            offline=True,
            locale="en-US",
            timezone_id="UTC",
        )
        self._context.set_default_timeout(1000 * _PAGE_DEADLINE_S)
        self._page = await self._context.new_page()
        self._cdp = await self._context.new_cdp_session(self._page)

    async def show_phone(self, html: str, state: dict[str, Any]) -> None:
        if self._shown != "phone":
            await self._page.goto("about:blank")
            await self._page.set_content(html)
            self._shown = "phone"
        await self._page.evaluate(_LOAD, state)

    async def show_page(self, html: str) -> None:
        self._shown = ""
        await self._page.goto("about:blank")
        await self._page.set_content(html)
        await self._page.evaluate(f"async () => {{ {_DRAWN} }}")

    async def show_miniwob(self, path: str, seed: int) -> str:
        await self._page.goto(Path(path).as_uri())
        self._shown = path
        return await self._page.evaluate(_MINIWOB_START, seed)

    async def outcome(self) -> dict[str, Any]:
        return await self._page.evaluate(_MINIWOB_OUTCOME)

    async def inspect(self) -> dict[str, Any]:
        return await self._page.evaluate(_INSPECT)

    async def screenshot(self) -> bytes:
        shot = await self._cdp.send("Page.captureScreenshot", {"format": "png", "optimizeForSpeed": True})
        return base64.b64decode(shot["data"])

    async def tap(self, x: float, y: float) -> None:
        await self._page.touchscreen.tap(x, y)

    async def swipe(self, x1: float, y1: float, x2: float, y2: float, seconds: float) -> None:
        steps = 5
        await self._touch("touchStart", x1, y1)
        for step in range(1, steps + 1):
            share = step / steps
            await self._touch("touchMove", x1 + (x2 - x1) * share, y1 + (y2 - y1) * share)
            await asyncio.sleep(seconds / steps)
        await self._touch("touchEnd")

    async def _touch(self, kind: str, *point: float) -> None:
        points = [{"x": point[0], "y": point[1]}] if point else []
        await self._cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    async def text(self, text: str) -> None:
        await self._page.keyboard.insert_text(text)

    async def key(self, name: str) -> None:
        if name == "enter":
            await self._page.keyboard.press("Enter")
        elif self._shown == "phone":
            await self._page.evaluate(_KEY, name)

    async def health(self) -> str:
        return f"Chromium {self._browser.version}: {await self._page.title()}"

    async def close(self) -> None:
        if self._context is not None:
            await self._context.close()


CALLS = frozenset(name for name in vars(_Phone) if not name.startswith("_") and name != "close")


class _Hub:
    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._connected = 0
        self.idle_since = asyncio.get_running_loop().time()

    @property
    def idle_s(self) -> float:
        """Seconds since the last phone disconnected; 0 while one is connected."""
        return 0.0 if self._connected else asyncio.get_running_loop().time() - self.idle_since

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one phone until its connection ends."""
        if not is_of_this_user(writer.get_extra_info("socket")):
            writer.close()
            return
        phone = _Phone(self._browser)
        self._connected += 1
        try:
            while True:
                size = LENGTH.unpack(await reader.readexactly(LENGTH.size))[0]
                if size > _LARGEST_MESSAGE:
                    return
                reply = await _answer(phone, await reader.readexactly(size))
                writer.write(LENGTH.pack(len(reply)) + reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()
            # If the browser has ended, so has the phone.
            with contextlib.suppress(Error, TimeoutError):
                async with asyncio.timeout(_PAGE_DEADLINE_S):
                    await phone.close()
            self._connected -= 1
            self.idle_since = asyncio.get_running_loop().time()


async def _answer(phone: _Phone, message: bytes) -> bytes:
    name, arguments = json.loads(message)
    try:
        if name not in CALLS:
            raise ValueError(f"unknown call {name!r}")
        async with asyncio.timeout(_PAGE_DEADLINE_S):
            value = await getattr(phone, name)(*arguments)
    except TimeoutError:
        return b"e" + f"{name} did not finish within {_PAGE_DEADLINE_S:g} s".encode()
    except Exception as error:
        return b"e" + f"{name}: {type(error).__name__}: {error}".encode("utf-8", "replace")
    return b"p" + value if isinstance(value, bytes) else b"j" + json.dumps(value).encode()


async def run_hub(owner_pid: int, executable: str) -> None:
    """Serve until the owner or the browser ends, or no phone has been connected for `IDLE_S`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(socket_name(owner_pid))
    except OSError:
        return  # another hub was faster
    owner = os.pidfd_open(owner_pid)
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(owner, over.set)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=executable, headless=True, args=list(_FLAGS), timeout=_LAUNCH_DEADLINE_MS
        )
        browser.on("disconnected", lambda _: over.set())
        hub = _Hub(browser)
        server = await asyncio.start_unix_server(hub.serve, sock=listener, limit=_LARGEST_MESSAGE)
        while not over.is_set() and hub.idle_s < IDLE_S:
            try:
                async with asyncio.timeout(IDLE_S / 4):
                    await over.wait()
            except TimeoutError:
                continue
        server.close()
        if browser.is_connected():
            await browser.close()


if __name__ == "__main__":
    try:
        asyncio.run(run_hub(int(sys.argv[1]), sys.argv[2]))
    except ProcessLookupError:
        sys.exit("its owner process has ended")
    except Error as error:
        sys.exit(f"the browser {sys.argv[2]} did not start: {str(error).splitlines()[0]}")
