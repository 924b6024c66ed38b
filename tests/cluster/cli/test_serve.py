"""`coso serve`: the policy server's engine as the judge of phone tasks, as a user would start it."""

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from envs.android.evaluators import Moment
from envs.android.evaluators.judge import JudgeEvaluator
from envs.android.tasks import Task

pytestmark = pytest.mark.end_to_end

TASK = Task("t", "Turn on Wi-Fi")
ANSWERS = {240: "The switch is on.\nStatus: success", 15: "The switch is off.\nStatus: failure"}


def screen(value: int) -> np.ndarray:
    return np.full((64, 48, 3), value, np.uint8)


def taught_judge(folder: Path, screens: int) -> None:
    """A small model that has learnt by heart what to say of a bright and of a dark screen."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    from actors.chat import ChatProcessor
    from learner.supervised.default_model import make_default_vlm
    from tests.tiny_models import SMALL

    messages = JudgeEvaluator("http://127.0.0.1/v1", "m")._request(TASK.instruction, [])["messages"]
    texts = [part if isinstance(part := message["content"], str) else part[0]["text"] for message in messages]
    make_default_vlm(folder, [*texts, *ANSWERS.values()], [screen(value) for value in ANSWERS], SMALL, seed=0)
    chat = ChatProcessor(str(folder))
    messages[-1]["content"] += [{"type": "image"}] * screens
    prompt = chat.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    end = chat.tokenizer.convert_ids_to_tokens(chat.eos_token_ids[0])
    images = [[Image.fromarray(screen(value))] * screens for value in ANSWERS]
    whole = [prompt + answer + end for answer in ANSWERS.values()]
    inputs = chat.processor(text=whole, images=images, padding=True, padding_side="right", return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    asked = len(chat.processor(text=[prompt], images=images[:1])["input_ids"][0])
    labels[:, :asked] = -100
    for _ in range(300):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    model.save_pretrained(folder)


def started(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli.main", "serve", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def status_of(url: str, headers: dict[str, str]) -> tuple[int, str | None]:
    """The status, and which sites' pages may read the answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
            return response.status, response.headers.get("Access-Control-Allow-Origin")
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Access-Control-Allow-Origin")


def test_a_policy_server_judges_phone_tasks(tmp_path: Path) -> None:
    taught_judge(tmp_path / "judge", screens=1)
    process = started("--model", str(tmp_path / "judge"), "--port", "0", "--name", "judge")
    assert process.stdout is not None
    try:
        output = ""
        ends = time.monotonic() + 120
        while not (address := re.search(r"serving 'judge' at (http://127\.0\.0\.1:\d+/v1)", output)):
            line = process.stdout.readline()
            output += line
            assert line and time.monotonic() < ends, output
        judge = JudgeEvaluator(address[1], "judge", screens=1, attempts=1)
        for value, answer in ANSWERS.items():
            verdict = judge.verdict(Moment(TASK, [screen(value)], None, None))
            assert verdict.success == ("success" in answer)
        for headers in (
            {"Host": "evil.example"},
            {"Origin": "http://evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
        ):
            assert status_of(address[1] + "/models", headers) == (403, None)
        status, allowed = status_of(address[1] + "/models", {})
        assert status == 200 and allowed is None
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 130 and "Traceback" not in rest
    finally:
        process.kill()


def test_an_engine_does_not_outlive_a_server_that_is_killed(tmp_path: Path) -> None:
    """Outside Ray, which ends what its workers started. The engine is just starting, so it notices by itself."""
    from learner.supervised.default_model import make_default_vlm
    from tests.tiny_models import SMALL

    make_default_vlm(tmp_path / "model", ["Hello"], [screen(15)], SMALL, seed=0)
    process = started("--model", str(tmp_path / "model"), "--port", "0")
    server = psutil.Process(process.pid)
    started_by_server: list[psutil.Process] = []
    try:
        ends = time.monotonic() + 120
        while not (engines := [child for child in server.children() if "EngineCore" in child.name()]):
            assert process.poll() is None and time.monotonic() < ends
            time.sleep(0.1)
        started_by_server = server.children(recursive=True)
        server.kill()
        _, alive = psutil.wait_procs(engines, timeout=60)
        assert not alive
    finally:
        for left in (server, *started_by_server):
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "no/such/model"], "no/such/model"),
        (["--model", "m", "--port", "{taken}"], "choose another --host or --port"),
        (["policy_server.no_key=1"], "no_key"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_message(words: list[str], said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = started(*(word.format(taken=taken.getsockname()[1]) for word in words))
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in output
    assert re.search(r"^coso: .*", output, re.MULTILINE) and said in output
