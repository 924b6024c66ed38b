"""The targets of `benchmarks/fuzz.py`: everything that reads what models, devices, servers and files of others say."""

from __future__ import annotations

import base64
import json
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import envs  # noqa: F401  registers ours
from actors.images import encode_png
from actors.trajectory import TrajectoryBatch
from benchmarks.fuzz import Target
from benchmarks.fuzz_files import (
    DEEP,
    JSON_WORDS,
    PICTURE,
    PNG,
    configs,
    metrics,
    model_folders,
    overrides,
    png,
    run_records,
    tasks,
    trajectories,
)
from envs.android.adb import _decode_raw
from envs.android.adb_server import AdbServer
from envs.android.appium import error_message, read_screenshot, read_value
from envs.android.device import DeviceError
from envs.android.evaluators.judge import TryAgain, read_status
from envs.android.formats import PhoneParser
from envs.labels import NOT_APPLICABLE, LabelHead, LabelSpace
from envs.output import EnvironmentOutput, EnvironmentOutputError
from envs.parsing import Parser

#: What an environment may return, and what it may not.
SOUND: dict[str, Any] = {"image": PICTURE, "prompt": "Go.", "reward": 1.0, "terminated": False, "truncated": False,
                         "action": "+", "action_labels": [1, -1], "valid": True, "success": False,
                         "action_start": 3}  # fmt: skip
STRANGE: list[Any] = [
    ..., None, True, 0, 1, -1, 2**40, 10**400, 1.0, float("nan"), float("inf"), 1j, "", "\ud83d", b"+", [],
    [1, -1], [[1], 2],
    (0, 1), {}, {1: 2}, {"success"}, np.array(1.0), np.array([1.0]), np.array([1, -1]), np.array([3, 0]), np.array([]),
    np.float32("nan"), np.True_, np.str_("a"), np.zeros((4, 5)), np.zeros((4, 5, 1), np.int64), np.ones((4, 5, 3)),
    np.full((4, 5, 4), 255, np.uint8), np.zeros((0, 5, 3), np.uint8), PICTURE[::2, ::-1], PICTURE / 255,
    PICTURE.tolist(),
    np.array([None, "a"], object), np.datetime64("2026-01-01"), np.array("a"), object(), int, lambda: 0, range(2),
    SOUND,
]  # fmt: skip


def actions(folder: Path) -> Target:
    corpus = [
        '{"thoughts": "3 - 5 is less", "action": "+"}',
        '{"name": "mobile_use", "arguments": {"action": "swipe", "coordinate": [5, 9], "coordinate2": [500, 1000]}}',
        '{"action": "type", "text": "a \\"b\\" \\ud83d"} {"action": "terminate", "status": "failure"}',
        'Action Decision: "action_type": "DUAL_POINT", "touch_point": "[0.8, 0.5]", "lift_point": "[0.2, 0.5]"',
        '"action_type": "TYPE", "typed_text": "best "rated" mug"',
        'Grounded Operation: tap the "Search" button [[450,120]]',
        'Grounded Operation: type "best rated mug" in the field',
    ]
    words = [b'"action":', b"Grounded Operation:", b'"action_type":', b'"touch_point": "[', b"[[", b"press home", b"10",
             b"-0.", b'"coordinate": [', b"hit", b"stand", b"=", b"\xed\xa0\xbd", b"\xf0\x9f\x98\x80",
             *JSON_WORDS]  # fmt: skip
    games = ["coso/NumberLine-v0", "coso/Blackjack-v0", "coso/Points24-v0"]
    parsers: list[tuple[Parser, LabelSpace]] = []
    for game in games:
        task: Any = gymnasium.make(game).unwrapped
        parsers.append((task.parser, task.label_space))
    from envs.android.actions import LABEL_SPACE

    parsers += [(PhoneParser((360, 640)), LABEL_SPACE), (PhoneParser((1080, 1920), "pixels"), LABEL_SPACE)]

    def read(data: bytes) -> None:
        try:
            text = data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        for parser, space in parsers:
            parsed = parser.parse(text)
            assert parsed.start is None or 0 <= parsed.start <= len(text)
            assert ((parsed.labels >= NOT_APPLICABLE) & (parsed.labels < space.sizes)).all()
            assert parsed.valid == bool(parsed.action) == bool((parsed.labels != NOT_APPLICABLE).any())

    return Target("actions", [each.encode() for each in corpus], words, read, (), 470_000)


def judge_answers(folder: Path) -> Target:
    said = {"choices": [{"message": {"role": "assistant", "content": "It shows a lamp.\nStatus: success"}}]}
    corpus = [json.dumps(said).encode(), b'{"error": {"message": "overloaded"}}', b"<html>502</html>"]
    words = [b"Status: success", b"\\nStatus: failure", b'"choices"', b'"content": null', *JSON_WORDS]
    return Target("judge answers", corpus, words, read_status, (TryAgain,), 130_000)


def appium_replies(folder: Path) -> Target:
    corpus = [
        json.dumps({"value": base64.b64encode(PNG).decode()}).encode(),
        b'{"value": {"sessionId": "1f", "capabilities": {}}}',
        b'{"value": {"error": "no such element", "message": "An element could not be located\\nline 2"}}',
    ]

    def read(data: bytes) -> None:
        error_message(data)
        read_screenshot(read_value(data, "Appium", "screenshot"), "Appium")

    return Target("appium replies", corpus, [b'"value":', b'"message":', *JSON_WORDS], read, (DeviceError,), 110_000)


class _Answering(socketserver.ThreadingTCPServer):
    """Gives each connection the current answer, whatever it asks, and hangs up."""

    answer = b""
    request_queue_size = 64


class _Answer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with suppress(OSError):
            self.request.sendall(self.server.answer)  # type: ignore[attr-defined]


def _serving(server: socketserver.BaseServer) -> int:
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return int(server.server_address[1])


def adb_replies(folder: Path) -> Target:
    """Over a real socket: the answers of an adb server to its four requests."""
    packets = struct.pack("<BI", 1, 3) + b"ok\n" + struct.pack("<BI", 3, 1) + b"\0"
    corpus = [
        b"OKAYOKAY" + packets,
        b"OKAYOKAY" + struct.pack("<BI", 2, 5) + b"wrong" + struct.pack("<BI", 3, 1) + b"\1",
        b"OKAYOKAY" + PNG,
        b"OKAY0015emulator-5554\tdevice\n",
        b"OKAY0011connected to device",
        b"FAIL0010device not found",
    ]
    server = _Answering(("127.0.0.1", 0), _Answer)
    adb = AdbServer(port=_serving(server))
    calls: Iterator[Callable[[], object]]
    calls = _in_turn(
        lambda: adb.shell("emulator-5554", "getprop", 5.0),
        lambda: adb.exec("emulator-5554", "screencap -p", 5.0),
        lambda: adb.states(5.0),
        lambda: adb.connect("127.0.0.1:5555", 5.0),
    )

    def read(data: bytes) -> None:
        server.answer = data
        next(calls)()

    words = [b"OKAY", b"FAIL", b"ffff", b"-001", b"+1 f", b"0x1f", b"\xff\xff\xff\xff", b"\3\1\0\0\0\0", b"\t"]
    return Target("adb replies", corpus, words, read, (DeviceError,), 15_000)


def http_replies(folder: Path) -> Target:
    """Over real HTTP: whole answers of an Appium server, status line and headers included."""
    from envs.android.appium import AppiumPhone

    value = json.dumps({"value": {"sessionId": "1f", "capabilities": {}}}).encode()
    head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    corpus = [
        head % (b"200 OK", len(value)) + value,
        head % (b"500 Error", len(value)) + value,
        b"HTTP/1.1 204 \r\n\r\n",
    ]
    server = _Answering(("127.0.0.1", 0), _Answer)
    url = f"http://127.0.0.1:{_serving(server)}"

    def read(data: bytes) -> None:
        server.answer = data
        AppiumPhone("device", url, deadline_s=2.0, start_deadline_s=2.0)

    words = [
        b"\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: -1\r\n",
        b"Location: file:///\r\n",
        b"HTTP/1.1 302 ",
    ]
    return Target("http replies", corpus, [*words, *DEEP], read, (DeviceError,), 4_000)


def screens(folder: Path) -> Target:
    """Pixels as `screencap` sends them without -p."""
    pixels = np.dstack([PICTURE, PICTURE[:, :, :1]]).tobytes()
    corpus = [struct.pack("<III", 30, 20, 1) + pixels, struct.pack("<IIII", 30, 20, 1, 0) + pixels]
    corpus.append(struct.pack("<III", 0, 20, 1))

    def read(data: bytes) -> None:
        assert _decode_raw(data, "a device").size

    words = [struct.pack("<I", number) for number in (0, 1, 0xFFFFFFFF, 0x7FFFFFFF)]
    return Target("raw screens", corpus, words, read, (DeviceError,), 80_000)


def environment_outputs(folder: Path) -> Target:
    """What environments return: each byte chooses the value of a field."""
    output = EnvironmentOutput("mine/Game-v0", LabelSpace((LabelHead("kind", 3), LabelHead("place", 2))))
    fields = ("image", "prompt", "reward", "terminated", "truncated", "action", "action_labels", "valid", "success",
              "action_start", "info", "observation", "result")  # fmt: skip

    def read(data: bytes) -> None:
        values = SOUND | {name: STRANGE[each % len(STRANGE)] for name, each in zip(fields, data, strict=False) if each}
        observation: Any = {name: values[name] for name in ("image", "prompt") if values[name] is not ...}
        info: Any = {name: values[name] for name in fields[5:10] if values[name] is not ...}
        observation, info = (values.get(name, made) for name, made in (("observation", observation), ("info", info)))
        result: Any = (observation, values["reward"], values["terminated"], values["truncated"], info)
        observation, reward, terminated, truncated, info = output.step(values.get("result", result), "utterance")
        assert np.isfinite(reward) and type(terminated) is type(truncated) is bool
        encode_png(observation["image"])
        TrajectoryBatch.from_rows([{"action_start": info["action_start"], "action_labels": info["action_labels"]}], {})
        json.dumps([observation["prompt"], info["action"]], ensure_ascii=False).encode()

    corpus = [bytes(13), bytes(range(13))]
    return Target("environment outputs", corpus, [], read, (EnvironmentOutputError,), 20_000)


_TARGETS = {
    "actions": actions, "judge answers": judge_answers, "appium replies": appium_replies, "adb replies": adb_replies,
    "http replies": http_replies, "raw screens": screens, "png": png, "configs": configs, "overrides": overrides,
    "tasks": tasks, "metrics": metrics, "run records": run_records, "trajectories": trajectories,
    "environment outputs": environment_outputs, "model folders": model_folders,
}  # fmt: skip
NAMES = list(_TARGETS)


def targets(folder: Path, names: set[str]) -> dict[str, Target]:
    """The targets of these names; they write into subfolders of `folder`."""
    made = {}
    for name in NAMES:
        if name in names:
            own = folder / name.replace(" ", "-")
            own.mkdir()
            made[name] = _TARGETS[name](own)
    return made


def _in_turn(*calls: Callable[[], object]) -> Iterator[Callable[[], object]]:
    while True:
        yield from calls
