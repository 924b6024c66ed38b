"""The targets of `benchmarks/fuzz.py`: everything that reads what models, devices, servers and files of others say."""

from __future__ import annotations

import base64
import json
import shutil
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow.parquet as pq

import envs  # noqa: F401  registers ours
from actors.images import decode_png, encode_png
from actors.trajectory import TrajectoryBatch, TrajectoryLog, UnreadableTrajectory
from benchmarks.fuzz import Target
from cluster.config.files import load_config, to_yaml
from cluster.errors import CosoError
from cluster.report.samples import influence_profiles, sample_episodes
from cluster.run.run_folder import RunFolder
from cluster.telemetry.metrics import read_metrics
from envs.android.adb import _decode_raw
from envs.android.adb_server import AdbServer
from envs.android.appium import error_message, read_screenshot, read_value
from envs.android.device import DeviceError, decode_picture
from envs.android.evaluators.judge import TryAgain, read_status
from envs.android.formats import PhoneParser
from envs.android.tasks import read_task_file
from envs.labels import NOT_APPLICABLE, LabelHead, LabelSpace
from envs.output import EnvironmentOutput, EnvironmentOutputError
from envs.parsing import Parser
from envs.png import UnreadableImage

ROOT = Path(__file__).resolve().parents[1]
DEEP = [b"[", b"{", b'{"a":', b"]", b"}"]
JSON_WORDS = [*DEEP, b'"', b"\\ud83d", b"\\u0000", b",", b":", b"null", b"true", b"1e999", b"NaN", b"9" * 5000, b"\\"]
YAML_WORDS = [*DEEP, b"&a ", b"*a ", b"<<: ", b"!!binary ", b"!!python/name:os.system ", b"? ", b"- ", b"\n  ", b": ",
              b"~", b"2026-01-01", b"0o17", b"1:30:00", b".nan", b'"\\ud83d"', b"\t", b"%TAG", b"---\n"]  # fmt: skip
PICTURE = np.indices((20, 30)).sum(axis=0)[:, :, None].repeat(3, axis=2).astype(np.uint8)
PNG = encode_png(PICTURE)
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


def png(folder: Path) -> Target:
    """PNG of devices, and of a run folder."""
    import io

    from PIL import Image, PngImagePlugin

    corpus = [PNG]
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "a" * 300, zip=True)
    for mode in ("P", "L", "1", "RGBA", "I;16"):
        stream = io.BytesIO()
        Image.fromarray(PICTURE).convert("L" if mode == "I;16" else mode).convert(mode).save(
            stream, "PNG", pnginfo=texts
        )
        corpus.append(stream.getvalue())

    def read(data: bytes) -> None:
        with suppress(UnreadableImage):
            assert decode_png(data).size > (0, 0)
        assert decode_picture(data, "a device").size

    words = [
        b"IHDR",
        b"IDAT",
        b"PLTE",
        b"tRNS",
        b"zTXt",
        b"iCCP",
        b"acTL",
        b"fcTL",
        b"IEND",
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
    ]
    return Target("png", corpus, words, read, (DeviceError,), 130_000)


def configs(folder: Path) -> Target:
    corpus = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    path = folder / "config.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        config = load_config([path])
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_config([path]) == config

    return Target(
        "configs", corpus, [*YAML_WORDS, b"training:", b"updates: ", b"model: {path: x}"], read, (CosoError,), 4_000
    )


def overrides(folder: Path) -> Target:
    corpus = [b"training.updates=10", b"environment.kwargs={max_position: 7}", b"algorithm.name=ppo", b"seed=1"]

    def read(data: bytes) -> None:
        to_yaml(load_config([], [data.decode("utf-8", "surrogateescape")])).encode()

    return Target("overrides", corpus, [*YAML_WORDS, b".", b"=", b"environment."], read, (CosoError,), 8_000)


def tasks(folder: Path) -> Target:
    yamls = [path.read_bytes()[:1500] for path in sorted((ROOT / "configs/tasks").glob("*.yaml"))]
    checks = b"- instruction: Open it\n  checks: [{activity: com.android.settings}, {setting: global/a, value: 1}]\n"
    places = {True: folder / "tasks.yaml", False: folder / "tasks.txt"}

    def read(data: bytes) -> None:
        path = places[b"instruction" in data]
        path.write_bytes(data)
        assert read_task_file(path)

    corpus = [*yamls, checks, b"# errands\nOpen the clock\nSet an alarm\n"]
    words = [*YAML_WORDS, b"instruction: ", b"checks: "]
    return Target("tasks", corpus, words, read, (ValueError,), 8_000)


def metrics(folder: Path) -> Target:
    rows = [{"update": n, "evaluation/success": 0.5, "time/collect": 2.0, "policy/loss": None} for n in range(4)]
    path = folder / "metrics.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        assert all(isinstance(row["update"], int) for row in read_metrics(path))

    corpus = ["".join(json.dumps(row) + "\n" for row in rows).encode()]
    return Target("metrics", corpus, [*JSON_WORDS, b"\n", b"\xe2\x80\xa8", b'"update": '], read, (), 20_000)


def run_records(folder: Path) -> Target:
    """The small JSON files of a run folder."""
    run = RunFolder(folder / "run")
    checkpoint = run.checkpoint_path(3)
    checkpoint.mkdir(parents=True)
    (run.path / "config.yaml").write_text("name: run\n", encoding="utf-8")
    progress = {"schema_version": 1, "update": 3, "environment_steps": 9, "wall_seconds": 1.5, "success_before": 0.5,
                "recoveries": {"actor": 1}, "steps_trained": 9, "steps_dropped": 0}  # fmt: skip
    corpus = [json.dumps(progress).encode(), b'{"1": {"taken": 32, "dropped": 0}, "2": {"taken": 64, "dropped": 1}}']

    def read(data: bytes) -> None:
        (checkpoint / "progress.json").write_bytes(data)
        run.steps.write_bytes(data)
        with suppress(CosoError):
            run.read_steps()
        run.read_progress(run.checkpoint_updates()[-1])

    words = [*JSON_WORDS, b'"update": ', b'"schema_version": 1']
    return Target("run records", corpus, words, read, (CosoError,), 8_000)


def _logged(folder: Path) -> TrajectoryLog:
    from actors.images import image_hash

    key = image_hash(PICTURE)
    rows = [
        {"run": "r", "episode": f"e{n // 3}", "environment": "coso/NumberLine-v0", "step": n % 3, "seed": n,
         "prompt": "Go.", "image": key, "prompt_ids": [1, 2], "response_ids": [3, 4],
         "behaviour_logprobs": [-0.5, -1.0],
         "policy_versions": [{"version": 1, "start": 0}], "utterance": '{"action": "+"}', "action": "+",
         "action_labels": [1], "valid": True, "reward": float(n % 2), "end_reason": "terminated" if n % 3 == 2 else "",
         "influence": [0.5, 0.25]}
        for n in range(9)
    ]  # fmt: skip
    log = TrajectoryLog(folder)
    log.write(1, TrajectoryBatch.from_rows(rows, {key: PNG}))
    return log


def trajectories(folder: Path) -> Target:
    """A batch, or the pictures, of a run folder that is damaged, read as the report does."""
    log = _logged(folder / "sound")
    files = {"batch_000001.parquet": b"", "images_000001.parquet": b""}
    files = {name: (log.folder / name).read_bytes() for name in files}
    plain = folder / "plain.parquet"
    pq.write_table(pq.read_table(log.batch_path(1)), plain, compression="none", use_dictionary=False)
    corpus = [*files.values(), plain.read_bytes()]
    damaged = folder / "damaged"

    def read(data: bytes) -> None:
        for name, whole in files.items():
            damaged.mkdir(exist_ok=True)
            (damaged / name).write_bytes(data if (b"png" in data) == name.startswith("images") else whole)
        samples, unread = sample_episodes(damaged, None)
        influence_profiles(damaged)
        assert samples or unread or not len(TrajectoryLog(damaged).read(1))

    words = [b"PAR1", b"\xff\xff\xff\xff", b"\0\0\0\0", b"coso.schema_version", b"reward", b"\x15\x04"]
    return Target("trajectories", corpus, words, read, (UnreadableTrajectory,), 3_000)


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


def model_folders(folder: Path) -> Target:
    """A model's folder with one file broken: the first byte names the file, the rest is what it then holds."""
    from actors.chat import ChatProcessor, NotAVisionLanguageModel
    from learner.supervised.default_model import DefaultModelOptions, make_default_vlm

    sound = folder / "sound-model"
    sizes = DefaultModelOptions(hidden=32, layers=2, image_size=64, vision_hidden=32, vision_layers=1, vocabulary=320)
    make_default_vlm(sound, ['{"thoughts": "so", "action": "+"}'], [PICTURE], sizes, seed=1)
    names = sorted(path.name for path in sound.iterdir() if path.suffix in (".json", ".jinja"))
    corpus = [bytes([number]) + (sound / name).read_bytes() for number, name in enumerate(names)]
    broken = folder / "broken-model"

    def read(data: bytes) -> None:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(sound, broken)
        (broken / names[data[0] % len(names)] if data else broken / names[0]).write_bytes(data[1:])
        ChatProcessor(str(broken))

    words = [*JSON_WORDS, b"{{ ", b"{% for m in messages %}", b"image", b'"model_type": "qwen2_vl"', b"eos_token_id"]
    return Target("model folders", corpus, words, read, (NotAVisionLanguageModel,), 400)


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
