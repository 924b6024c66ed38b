"""Stands in for an Appium server with UiAutomator2: the WebDriver calls our driver makes, done to an embedded phone."""

import base64
import http.server
import io
import json
import threading
from typing import Any

from PIL import Image

from envs.android.browser import BrowserPhone
from envs.android.device import Start
from envs.android.phone.content import initial_state

KEYS = {4: "back", 3: "home", 66: "enter"}


class AppiumStandIn:
    """An HTTP server on loopback; `trouble`, where set, is sent instead of the next answer: (status, body)."""

    def __init__(self, phone: BrowserPhone, seed: int) -> None:
        self.phone, self.seed = phone, seed
        self.sessions: set[str] = set()
        self.trouble: tuple[int, bytes] | None = None
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.reply(lambda: stand_in.post(self.path, json.loads(body)))

            def do_GET(self) -> None:
                self.reply(lambda: stand_in.get(self.path))

            def do_DELETE(self) -> None:
                self.reply(lambda: stand_in.sessions.remove(self.path.removeprefix("/session/")))

            def reply(self, answer: Any) -> None:
                status, body = stand_in.trouble or (200, b"")
                stand_in.trouble = None
                if not body:
                    try:
                        body = json.dumps({"value": answer()}).encode()
                    except (KeyError, ValueError) as error:
                        status, body = 404, json.dumps({"value": {"message": f"no: {error}"}}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def call(self, path: str) -> str:
        """What is asked of a session that there is."""
        _, _, session, call = [*path.split("/", 3), ""][:4]
        if session not in self.sessions:
            raise KeyError(f"session {session}")
        return call

    def get(self, path: str) -> Any:
        if path == "/status":
            return {"ready": True, "message": "the stand-in is ready"}
        if self.call(path) != "screenshot":
            raise KeyError(path)
        buffer = io.BytesIO()
        Image.fromarray(self.phone.screenshot()).save(buffer, "PNG", compress_level=1)
        return base64.b64encode(buffer.getvalue()).decode()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/session":
            wanted = body["capabilities"]["alwaysMatch"]
            assert wanted["platformName"] == "Android" and wanted["appium:automationName"] == "UiAutomator2"
            self.phone.reset(Start(initial_state(self.seed)))
            self.sessions.add(f"s{len(self.sessions) + 1}")
            return {"sessionId": f"s{len(self.sessions)}", "capabilities": wanted}
        call = self.call(path)
        if call == "actions":
            self.touch(body["actions"])
        elif call == "execute/sync":
            self.mobile(body["script"], *body["args"])
        else:
            raise KeyError(path)
        return None

    def touch(self, actions: list[dict[str, Any]]) -> None:
        (finger,) = actions
        assert finger["parameters"] == {"pointerType": "touch"}
        kinds = [each["type"] for each in finger["actions"]]
        assert kinds[:2] == ["pointerMove", "pointerDown"] and kinds[-1] == "pointerUp"
        width, height = self.phone.screen_size
        points = [
            ((each["x"] + 0.5) / width, (each["y"] + 0.5) / height)
            for each in finger["actions"]
            if each["type"] == "pointerMove"
        ]
        if len(points) == 1:
            self.phone.tap(points[0])
        else:
            self.phone.swipe(points[0], points[-1])

    def mobile(self, script: str, arguments: dict[str, Any]) -> None:
        if script == "mobile: type":
            self.phone.text(arguments["text"])
        elif script == "mobile: pressKey":
            self.phone.key(KEYS[arguments["keycode"]])  # type: ignore[arg-type]
        elif script == "mobile: clearApp":
            self.phone.reset(Start(initial_state(self.seed)))
        else:
            raise KeyError(script)
