"""The processes behind `EnvironmentHost`: a fork server, and the environment processes that it forks.

Run as `python -m actors.rollouts.environment_process FD`, this is the fork server. It imports gymnasium and `envs`
once. For every socket that arrives on the control socket FD, it forks a process that serves one environment on it.
So a start costs a fork and not a new interpreter, the processes share memory, and they inherit nothing from the driver
(its main module, its threads, its models). When the driver ends, the fork server and its processes end too.

A message is an 8-byte length and a pickle, over a private socket pair between processes of one user. The first message
of a process is its pid with its pidfd, a handle that stays bound to this process even when the pid is used again.

Pictures are hashed and encoded here, in the environment's process. The host receives (key, PNG bytes) in place of the
array, or (key, None) for a picture that it still has.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from typing import Any

from actors.images import EncodedImage, RecentImages, encode_png, image_hash
from envs.labels import LabelSpace
from envs.output import EnvironmentOutput, EnvironmentOutputError
from envs.parent import end_with_parent
from envs.parsing import without_surrogates

PID = struct.Struct("<q")
LENGTH = struct.Struct("<Q")
#: PNG bytes that a host keeps of its environment's latest pictures, at least one picture.
RECENT_IMAGE_BYTES = 4 << 20
_PARENT_CHECK_MS = 1000
#: Longest message of an environment's exception that is passed on.
_MESSAGE_CHARACTERS = 1000


def frame(message: Any) -> bytes:
    """A message as it goes over the socket: its length, then its pickle."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(body)) + body


def run_fork_server(control: socket.socket) -> None:
    """Fork an environment process for every socket received, until the driver ends."""
    _preload()
    # Forked processes share the memory in use now. The garbage collector would write to it and so copy it.
    gc.collect()
    gc.freeze()
    # The kernel then reaps the processes; the driver notices an end through the pidfd.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Processes that environments share (phones share a browser) belong to this process and end with it.
    os.environ["COSO_ENVIRONMENTS_OWNER"] = str(os.getpid())
    driver_pid = os.getppid()
    poller = select.poll()
    poller.register(control, select.POLLIN)
    # Usually the socket ends when the driver does. Another process forked by the driver may hold a copy that keeps it
    # open, so check the parent's pid too.
    while os.getppid() == driver_pid:
        if not poller.poll(_PARENT_CHECK_MS):
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        with socket.socket(fileno=descriptors[0]) as channel:
            fork_server_pid = os.getpid()
            if os.fork() == 0:
                exit_code = 1
                try:
                    control.close()
                    end_with_parent(fork_server_pid)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    serve_environment(channel)
                    exit_code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    # Do not return into the fork server's frames and exit handlers.
                    for stream in (sys.stdout, sys.stderr):
                        with contextlib.suppress(Exception):  # the environment may have closed or replaced it
                            stream.flush()
                    os._exit(exit_code)


def _preload() -> None:
    """Import gymnasium and this project's environments, which each process would otherwise import for itself."""
    import gymnasium

    import envs

    for spec in gymnasium.registry.values():
        if spec.namespace == envs.NAMESPACE and isinstance(spec.entry_point, str):
            importlib.import_module(spec.entry_point.partition(":")[0])


def serve_environment(channel: socket.socket) -> None:
    """Send this process's pid and pidfd, then serve one environment until "close" or the socket's end."""
    faulthandler.enable()
    pidfd = os.pidfd_open(os.getpid())
    socket.send_fds(channel, [PID.pack(os.getpid())], [pidfd])
    os.close(pidfd)
    env: Any = None
    output: Any = None
    at_host: RecentImages[bool] = RecentImages(RECENT_IMAGE_BYTES)
    try:
        while (request := _receive(channel)) is not None:
            method, arguments = request
            if method == "close":
                return
            try:
                if method == "make":
                    env, result = _make(**arguments)
                    output = EnvironmentOutput(arguments["env_id"], result)
                elif method == "parser":
                    result = getattr(env.unwrapped, "parser", None)
                elif method == "reset":
                    observation, *rest = output.reset(env.reset(**arguments))
                    result = (with_encoded_image(observation, at_host), *rest)
                else:
                    observation, *rest = output.step(env.step(**arguments), arguments["action"])
                    result = (with_encoded_image(observation, at_host), *rest)
                reply = frame(("ok", result))
            except EnvironmentOutputError as error:
                reply = frame(("error", _as_message(str(error))))
            except BaseException as error:  # SystemExit and KeyboardInterrupt are the environment's own here
                reply = frame(("error", _as_message(_described(error))))
            channel.sendall(reply)
    except ConnectionError:
        return
    finally:
        if env is not None:
            env.close()


def with_encoded_image(observation: dict[str, Any], at_host: RecentImages[bool]) -> dict[str, Any]:
    """The observation with its image, uint8 (H, W, 3), as (key, PNG bytes), or (key, None) if it is `at_host`.

    It notes a new image in `at_host`. Raises ValueError for an image that is no such array.
    """
    image = observation["image"]
    key = image_hash(image)
    png = None
    if not at_host.get(key):
        png = encode_png(image)
        at_host.put(key, True, len(png))
    return {**observation, "image": (key, png)}


def with_image_bytes(observation: dict[str, Any], held: RecentImages[bytes]) -> dict[str, Any]:
    """At the host: the observation of `with_encoded_image` with its image as an `EncodedImage`.

    held: the bytes received; its capacity is that of `at_host`, so it has those that the process did not send.
    """
    key, png = observation["image"]
    if png is None:
        png = held.get(key)
        assert png is not None
    else:
        held.put(key, png, len(png))
    return {**observation, "image": EncodedImage(key, png)}


def _make(env_id: str, kwargs: dict[str, Any], module_path: list[str]) -> tuple[Any, Any]:
    sys.path[:] = module_path
    import gymnasium

    # Gymnasium's own checker looks at the first step only, and stumbles over some of what it should name.
    env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    label_space = getattr(env.unwrapped, "label_space", None)
    if not isinstance(label_space, LabelSpace):
        raise TypeError(f"{env_id} has no label_space; make it follow the contract of envs.base.TextActionEnv")
    return env, label_space


def _described(error: BaseException) -> str:
    try:
        said = str(error)
    except Exception:  # an exception of the environment's own, which may be faulty too
        said = "(no message: its __str__ fails)"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {said[:_MESSAGE_CHARACTERS]}{'…' * (len(said) > _MESSAGE_CHARACTERS)}{place}"


def _as_message(text: str) -> str:
    """Text that any log and terminal takes."""
    return without_surrogates(text[: 2 * _MESSAGE_CHARACTERS])


def _receive(channel: socket.socket) -> Any:
    """The next message; None at the socket's end."""
    header = _receive_bytes(channel, LENGTH.size)
    body = header and _receive_bytes(channel, LENGTH.unpack(header)[0])
    return pickle.loads(body) if body else None


def _receive_bytes(channel: socket.socket, count: int) -> bytes | None:
    received = bytearray()
    while len(received) < count:
        part = channel.recv(min(count - len(received), 1 << 20))
        if not part:
            return None
        received += part
    return bytes(received)


if __name__ == "__main__":
    run_fork_server(socket.socket(fileno=int(sys.argv[1])))
