"""The process in which checks run: `python -m envs.contract.worker FD PARENT`, with JSON lines on the socket FD.

PARENT is the pid of its parent. The first line says what is tested, each further one asks for a check or for the trace
of a script.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import socket
import sys
import time
from typing import Any

from envs.android.drivers import open_device
from envs.contract.driver_checks import DRIVER_CHECKS
from envs.contract.environment_checks import ENVIRONMENT_CHECKS
from envs.contract.player import Environment, Player, described
from envs.contract.result import Broken, Passed
from envs.contract.session import Session, Subject
from envs.contract.trace import Script, Trace, replay
from envs.parent import end_with_parent


def serve(channel: socket.socket) -> None:
    """Answer requests until the socket ends."""
    lines = channel.makefile("r", encoding="utf-8")
    subject = Subject(**json.loads(lines.readline()))
    for line in lines:
        request = json.loads(line)
        begun = time.perf_counter()
        try:
            answer = _answered(subject, request)
        except Broken as error:
            answer = {"ok": False, "message": str(error), "measured": {}}
        except BaseException as error:  # SystemExit is the environment's own here
            answer = {"ok": False, "message": f"it raises {described(error)}", "measured": {}}
        answer["seconds"] = time.perf_counter() - begun
        channel.sendall((json.dumps(answer) + "\n").encode())


def _answered(subject: Subject, request: dict[str, Any]) -> dict[str, Any]:
    if "script" in request:
        with Player(_environment(subject)) as player:
            return {"ok": True, "trace": replay(player, Script(**request["script"]))}
    name = request["check"]
    if subject.kind == "driver":
        passed = _driver_check(subject, name)
    elif name == "determinism":
        passed = ENVIRONMENT_CHECKS[name](_environment(subject), lambda script: _in_another_process(subject, script))
    else:
        passed = ENVIRONMENT_CHECKS[name](_environment(subject))
    measured = {key: float(value) for key, value in passed.measured.items()}
    return {"ok": True, "message": passed.note, "measured": measured}


def _environment(subject: Subject) -> Environment:
    return Environment(subject.name, subject.options, tuple(subject.utterances), subject.deadline_s, subject.play_s)


def _driver_check(subject: Subject, name: str) -> Passed:
    try:
        device = open_device(subject.name, subject.options)
    except Exception as error:
        raise Broken(
            f"the driver {subject.name!r} cannot be opened with {subject.options}: {described(error)}"
        ) from error
    try:
        return DRIVER_CHECKS[name](device)
    finally:
        device.close()


def _in_another_process(subject: Subject, script: Script) -> Trace:
    with Session(subject) as session:
        answer = session.ask({"script": {"seeds": script.seeds, "utterances": script.utterances}}, "the replay")
    if not answer["ok"]:
        raise Broken(f"in another process: {answer['message']}")
    return answer["trace"]  # type: ignore[no-any-return]


if __name__ == "__main__":
    end_with_parent(int(sys.argv[2]))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # a parent whose patience ended asks where it is
    serve(socket.socket(fileno=int(sys.argv[1])))
