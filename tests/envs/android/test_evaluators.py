"""Evaluators: the judge against a real HTTP server, checks through real adb, and failures that are no zeros."""

import base64
import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from PIL import Image

import envs  # noqa: F401  (registers coso/...)
from envs.android.adb import AdbPhone
from envs.android.evaluators import EvaluatorError, Moment, StateEvaluator, Verdict
from envs.android.evaluators.adb_checks import AdbEvaluator
from envs.android.evaluators.base import ACCOMPLISHED, NOT_YET
from envs.android.evaluators.judge import JudgeEvaluator
from envs.android.tasks import Task
from tests.envs.android.conftest import EmbeddedOverAdb

TASK = Task("t", "Turn on Wi-Fi")
SUCCESS = "The switch is on.\nStatus: success"
FAILURE = "The switch is off.\nStatus: failure"
#: (status code, body) or a function that answers by itself.
Answer = tuple[int, bytes] | Callable[[http.server.BaseHTTPRequestHandler], None]


def completion(text: str) -> Answer:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Endpoint:
    """An OpenAI-compatible server on loopback that gives the answers it is told, the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                endpoint.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                endpoint.headers.append(dict(self.headers))
                assert self.path == "/v1/chat/completions"
                answer = endpoint.answers.pop(0) if len(endpoint.answers) > 1 else endpoint.answers[0]
                if callable(answer):
                    answer(self)
                    return
                self.send_response(answer[0])
                self.send_header("Content-Length", str(len(answer[1])))
                self.end_headers()
                self.wfile.write(answer[1])

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def screen(value: int) -> np.ndarray:
    picture = np.full((8, 6, 3), value, np.uint8)
    picture[0, 0] = (1, 2, 3)
    return picture


def moment(*values: int, task: Task = TASK, device: Any = None) -> Moment:
    return Moment(task, [screen(value) for value in values], None, device)


def judge(endpoint: Endpoint, **options: Any) -> JudgeEvaluator:
    return JudgeEvaluator(endpoint.url, "judge", **{"backoff_s": 0.01, "deadline_s": 2.0, **options})


def test_the_judge_sees_the_instruction_examples_and_the_last_screens(endpoint: Endpoint) -> None:
    endpoint.answers = [completion(SUCCESS)]
    assert judge(endpoint, screens=2).verdict(moment(1, 2, 3)) == ACCOMPLISHED
    request = endpoint.requests[0]
    assert request["model"] == "judge" and request["temperature"] == 0
    assert [message["role"] for message in request["messages"]] == ["system", *["user", "assistant"] * 3, "user"]
    text, *pictures = request["messages"][-1]["content"]
    assert "Turn on Wi-Fi" in text["text"]
    shown = []
    for picture in pictures:
        prefix, _, data = picture["image_url"]["url"].partition(",")
        assert prefix == "data:image/png;base64"
        shown.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    assert len(shown) == 2 and (shown[0] == screen(2)).all() and (shown[1] == screen(3)).all()


def test_the_judge_is_not_asked_again_about_what_it_has_seen(endpoint: Endpoint) -> None:
    endpoint.answers = [completion(FAILURE), completion(SUCCESS), completion(FAILURE)]
    evaluator = judge(endpoint, screens=1)
    verdicts = [evaluator.verdict(moment(value)) for value in (1, 1, 2, 1, 2)]
    assert [each.success for each in verdicts] == [False, False, True, False, True]
    assert len(endpoint.requests) == 2 and (evaluator.asked, evaluator.remembered) == (2, 3)
    # Another task on the same screen is another question.
    assert evaluator.verdict(moment(2, task=Task("u", "Turn off Wi-Fi"))) == NOT_YET
    assert len(endpoint.requests) == 3


def test_the_judges_memory_is_bounded(endpoint: Endpoint) -> None:
    endpoint.answers = [completion(FAILURE)]
    evaluator = judge(endpoint, screens=1, cache_size=2)
    for value in (1, 2, 1, 3, 1, 2):
        evaluator.verdict(moment(value))
    # 2 was the least recently used when 3 came.
    assert len(endpoint.requests) == 4


def slowly(handler: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)


def dripping(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def cut_off(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(503)
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b"over")


@pytest.mark.parametrize(
    "trouble",
    [
        (429, b"slow down"),
        (503, b"loading"),
        (200, b"<html>"),
        (200, b"{}"),
        (200, b'{"choices": []}'),
        (200, b"[" * 100_000),
        (200, b'{"choices": [{"message": {"content": null}}]}'),
        completion("I think it went well."),
        completion("Status: success\nStatus: failure"),
        completion("The Status: success is what the user wants"),
        slowly,
        dripping,
        cut_off,
    ],
)
def test_what_may_pass_is_tried_again(endpoint: Endpoint, trouble: Answer) -> None:
    endpoint.answers = [trouble, completion(SUCCESS)]
    assert judge(endpoint, deadline_s=0.5).verdict(moment(1)).success
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("text", ["Status: Success", "It is on.\n**Status: success**", "status : success.", SUCCESS])
def test_the_form_of_the_answer(endpoint: Endpoint, text: str) -> None:
    endpoint.answers = [completion(text)]
    assert judge(endpoint, attempts=1).verdict(moment(1)).success


def test_a_judge_that_keeps_failing_is_an_error_and_no_verdict(endpoint: Endpoint) -> None:
    endpoint.answers = [(500, b"out of memory")]
    evaluator = judge(endpoint, attempts=3)
    with pytest.raises(EvaluatorError, match=r"failed 3 times; last: HTTP 500: out of memory"):
        evaluator.verdict(moment(1))
    assert len(endpoint.requests) == 3
    # And nothing of it is remembered.
    endpoint.answers = [completion(SUCCESS)]
    assert evaluator.verdict(moment(1)).success


def test_a_judge_that_refuses_is_not_asked_again(endpoint: Endpoint) -> None:
    endpoint.answers = [(401, b"no such key")]
    with pytest.raises(EvaluatorError, match="HTTP 401: no such key"):
        judge(endpoint).verdict(moment(1))
    assert len(endpoint.requests) == 1


def test_a_judge_that_is_not_there() -> None:
    with pytest.raises(EvaluatorError, match="refused"):
        JudgeEvaluator("http://127.0.0.1:9/v1", "judge", attempts=2, backoff_s=0.01).verdict(moment(1))
    with pytest.raises(ValueError, match="url"):
        JudgeEvaluator("file:///etc/passwd", "judge")


def test_the_key_comes_from_the_environment(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSO_TEST_KEY", "not a secret")
    endpoint.answers = [completion(SUCCESS)]
    judge(endpoint, api_key_variable="COSO_TEST_KEY").verdict(moment(1))
    judge(endpoint, api_key_variable="COSO_UNSET_KEY").verdict(moment(1))
    assert [headers.get("Authorization") for headers in endpoint.headers] == ["Bearer not a secret", None]


def test_state_needs_a_phone_that_tells_it() -> None:
    with pytest.raises(EvaluatorError, match="embedded"):
        StateEvaluator().verdict(moment(1))


def checked(*checks: dict[str, Any], phone: Any) -> Verdict:
    return AdbEvaluator().verdict(moment(1, task=Task("t", "", device_checks=checks), device=phone))


def test_checks_read_the_device_through_adb(embedded_over_adb: EmbeddedOverAdb) -> None:
    phone, inside = embedded_over_adb.phone, embedded_over_adb.inside
    at = {target["id"]: (target["x"], target["y"]) for target in inside.inspect()["targets"]}
    settings = {"activity": "org.coso.settings"}
    assert not checked(settings, phone=phone).success
    phone.tap(at["open:settings"])
    assert checked(settings, phone=phone).success
    assert checked({"activity": "org.coso.settings/.Main"}, phone=phone).success
    assert not checked({"activity": "org.coso.settings/.Display"}, phone=phone).success
    installed, missing = {"package": "org.coso.maps"}, {"package": "org.coso.chess"}
    assert checked(settings, installed, {**missing, "absent": True}, phone=phone).success
    assert not checked(settings, missing, phone=phone).success
    wifi = int(inside.inspect()["state"]["settings"]["wifi"])
    assert checked({"setting": "global/wifi", "value": wifi}, phone=phone).success
    assert not checked({"setting": "global/wifi", "value": 1 - wifi}, phone=phone).success


@pytest.mark.parametrize(
    "check",
    [
        {"package": "a; reboot"},
        {"activity": "$(id)"},
        {"setting": "global/a b", "value": 1},
        {"setting": "nowhere/wifi", "value": 1},
        {"setting": "global/wifi"},
        {"file": "/sdcard/x"},
        {"package": "a", "color": "red"},
    ],
)
def test_checks_that_are_none_are_errors(embedded_over_adb: EmbeddedOverAdb, check: dict[str, Any]) -> None:
    with pytest.raises(EvaluatorError):
        checked(check, phone=embedded_over_adb.phone)


def test_a_check_that_cannot_be_made_is_an_error(embedded_over_adb: EmbeddedOverAdb) -> None:
    phone = AdbPhone(embedded_over_adb.phone.serial, server_port=_port(embedded_over_adb), reconnect_s=0.2)
    embedded_over_adb.device.stop()
    with pytest.raises(EvaluatorError, match="could not be made"):
        for _ in range(2):
            checked({"package": "org.coso.maps"}, phone=phone)
    with pytest.raises(EvaluatorError, match="driver 'adb'"):
        checked({"package": "x"}, phone=None)


def _port(over: EmbeddedOverAdb) -> int:
    return over.phone._server._address[1]


def test_a_phone_over_adb_judged_over_http(
    embedded_over_adb: EmbeddedOverAdb, adb_port: int, endpoint: Endpoint, tmp_path: Path
) -> None:
    tasks = tmp_path / "errands.txt"
    tasks.write_text("Open the settings\n")
    env = gymnasium.make(
        "coso/Android-v0",
        tasks=str(tasks),
        driver="adb",
        device={"serial": embedded_over_adb.phone.serial, "server_port": adb_port, "frame_s": 0.02},
        evaluator_options={"url": endpoint.url, "model": "judge", "attempts": 1, "screens": 1},
    )
    endpoint.answers = [completion(FAILURE), completion(SUCCESS)]
    observation, _ = env.reset(seed=1)
    assert observation["image"].shape == (640, 360, 3) and "Open the settings" in observation["prompt"]
    _, reward, terminated, _, info = env.step('{"action": "click", "coordinate": [500, 50]}')
    assert (reward, terminated, info["success"]) == (0.0, False, False)
    _, reward, terminated, _, info = env.step('{"action": "click", "coordinate": [500, 560]}')
    assert (reward, terminated, info["success"]) == (1.0, True, True)
    assert embedded_over_adb.inside.inspect()["state"]["screen"]["app"] == "settings"
    endpoint.answers = [(400, b"no")]
    env.reset(seed=2)
    with pytest.raises(EvaluatorError):
        env.step('{"action": "click", "coordinate": [820, 560]}')
