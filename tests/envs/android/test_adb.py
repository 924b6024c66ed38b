"""The adb driver against a real adb server: what it sends a shell, and devices that vanish, hang or send rubbish."""

import shlex
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from envs.android.adb import AdbPhone, _decode_png, _decode_raw, typing_commands
from envs.android.adb_server import AdbServer, DeviceGone
from envs.android.device import DeviceError, DeviceTimeout, settled
from tests.envs.android.conftest import EmbeddedOverAdb, ServedDevice, free_port

#: Prints its arguments, each ended by NUL, and stands in for the device's commands.
_ECHO = 'show() { printf \'%s\\0\' "$@"; }; am() { show am "$@"; }; input() { show input "$@"; }\n'

TINY = np.zeros((4, 3, 3), np.uint8)


def arguments_in_a_shell(command: str) -> list[str]:
    """The words that a real shell makes of a command line."""
    done = subprocess.run(["/bin/sh", "-c", _ECHO + command], capture_output=True, check=True)
    assert not done.stderr
    return done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]


def android_input_text(argument: str) -> str:
    """What `input text` types, after Android's own source (InputShellCommand.sendText), character by character."""
    typed: list[str] = []
    escape = False
    for character in argument:
        if escape and character == "s":
            typed[-1] = " "
            escape = False
            continue
        typed.append(character)
        escape = character == "%"
    return "".join(typed)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_with_the_adb_keyboard_no_text_is_syntax(text: str) -> None:
    import base64

    words = [arguments_in_a_shell(command) for command in typing_commands(text, adb_keyboard=True)]
    assert "".join(base64.b64decode(each[-1]).decode() for each in words) == text
    assert all(each[:-1] == ["am", "broadcast", "-a", "ADB_INPUT_B64", "--es", "msg"] for each in words)


@settings(max_examples=120, deadline=None)
@given(st.text(st.characters(max_codepoint=127) | st.sampled_from("%s'\"$`\\;&|<>(){}*?~#! \n"), max_size=40))
def test_with_input_text_no_text_is_syntax(text: str) -> None:
    typed = ""
    for command in typing_commands(text, adb_keyboard=False):
        words = arguments_in_a_shell(command)
        assert words[:2] == ["input", "text"] and len(words) == 3
        typed += android_input_text(words[2])
    assert typed == text.replace("\0", "")


def test_input_text_leaves_out_what_it_cannot_type() -> None:
    assert typing_commands("é\0 ü", adb_keyboard=False) == ["input text %s"]
    assert typing_commands("日本", adb_keyboard=False) == []


@pytest.mark.parametrize("package", ["a b", "com.app; reboot", "$(id)", "app", ""])
def test_package_names_are_checked_before_anything_is_sent(package: str) -> None:
    with pytest.raises(ValueError, match="clear_packages"):
        AdbPhone("x", clear_packages=[package])


class Troubled:
    """A device that answers with `screen`, and whose commands can be made to hang, fail or be slow."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.hang = threading.Event()
        self.release = threading.Event()
        self.cut = False
        self.fail_with = 0

    def __call__(self, command: str) -> tuple[int, bytes]:
        self.log.append(command)
        if self.hang.is_set():
            self.release.wait(30)
        if command.startswith("screencap"):
            png = _png(TINY)
            return 0, png[: len(png) // 2] if self.cut else png
        if command == "getprop sys.boot_completed":
            return 0, b"1\n"
        return self.fail_with, b"Error: no such thing\n" if self.fail_with else b"\n"


def _png(picture: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


Serve = Callable[..., ServedDevice]


@pytest.fixture
def troubled(serve: Serve, adb_port: int) -> Any:
    shell = Troubled()
    device = serve(shell)
    phone = AdbPhone(device.serial, server_port=adb_port, deadline_s=2.0, settle_s=0, reconnect_s=4.0)
    yield shell, device, phone
    shell.release.set()


def test_half_a_picture_is_an_error_that_says_so(troubled: Any) -> None:
    shell, _, phone = troubled
    shell.cut = True
    with pytest.raises(DeviceError, match="not a complete picture"):
        phone.screenshot()
    shell.cut = False
    assert phone.screenshot().shape == TINY.shape


WARNING = b"[Warning] Multiple displays were found, but no display id was specified! Defaulting to the first.\nA\n\r\n"


@pytest.mark.parametrize("colour_space", [b"", b"\1\0\0\0"])
@pytest.mark.parametrize("warning", [b"", WARNING])
@pytest.mark.parametrize("capture", ["png", "raw"])
@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**32 - 1))
@example(2, 0x10A, 0)  # a width that begins like an empty line
@settings(max_examples=10)
def test_a_warning_before_the_picture_is_skipped(
    capture: str, warning: bytes, colour_space: bytes, height: int, width: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    header = struct.pack("<III", width, height, 1) + colour_space
    data = _png(pixels[:, :, :3]) if capture == "png" else header + pixels.tobytes()
    decode = _decode_png if capture == "png" else _decode_raw
    assert (decode(warning + data, "screencap") == pixels[:, :, :3]).all()
    with pytest.raises(DeviceError, match="screencap sent"):
        decode(warning + data[: len(data) // 2], "screencap")


def test_one_of_several_displays_is_captured_and_touched(serve: Serve, adb_port: int) -> None:
    shell = Troubled()
    serial = serve(shell).serial
    display = 4619827259835644672
    phone = AdbPhone(
        serial, server_port=adb_port, settle_s=0, display=display, input_display=2, deadline_s=10, keyboard="input"
    )
    phone.screenshot()
    phone.tap((0.5, 0.5))
    phone.text("hi")
    phone.key("back")
    assert shell.log[-4:] == [
        f"screencap -d {display} -p",
        "input -d 2 tap 1 2",
        "input -d 2 text hi",
        "input -d 2 keyevent KEYCODE_BACK",
    ]
    for wrong in ("0; reboot", -1, True):
        with pytest.raises(ValueError, match="numbers of displays"):
            AdbPhone(serial, server_port=adb_port, display=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("header", [(0, 20, 1), (30, 0, 1), (2**32 - 1, 2**32 - 1, 1), (30, 20, 1), (30, 20, 4)])
def test_raw_pixels_that_are_no_picture_are_an_error(header: tuple[int, int, int]) -> None:
    with pytest.raises(DeviceError, match="the device sent"):
        _decode_raw(struct.pack("<III", *header), "the device")


def test_a_device_that_hangs_meets_the_deadline(troubled: Any) -> None:
    shell, _, phone = troubled
    shell.hang.set()
    started = time.monotonic()
    with pytest.raises(DeviceTimeout, match=r"did not finish shell,v2,raw:input tap .* in 2 s"):
        phone.tap((0.5, 0.5))
    assert time.monotonic() - started < 4


def test_a_command_that_fails_says_what_it_said(troubled: Any) -> None:
    shell, _, phone = troubled
    shell.fail_with = 7
    with pytest.raises(DeviceError, match="code 7: Error: no such thing"):
        phone.key("back")


def test_a_device_that_drops_off_the_network_is_connected_again(
    embedded_over_adb: EmbeddedOverAdb, adb_port: int
) -> None:
    phone = embedded_over_adb.phone
    before = phone.screenshot()
    AdbServer(port=adb_port).query(f"host:disconnect:{phone.serial}", 5.0)
    with pytest.raises(DeviceGone):
        AdbServer(port=adb_port).exec(phone.serial, "screencap -p", 5.0)
    # In mid-episode, and nothing of the episode is lost.
    assert (phone.screenshot() == before).all()


def test_a_device_that_hangs_up_is_connected_again(troubled: Any, adb_port: int) -> None:
    shell, device, phone = troubled
    device.hang_up()
    deadline = time.monotonic() + 10
    while AdbServer(port=adb_port).states(5.0).get(device.serial) == "device":
        assert time.monotonic() < deadline, "adb did not notice that the device hung up"
        time.sleep(0.02)
    phone.tap((0.5, 0.5))
    assert shell.log.count("input tap 1 2") == 1


def test_a_tap_that_may_have_happened_is_not_tried_again(troubled: Any) -> None:
    shell, device, phone = troubled
    shell.hang.set()
    threading.Timer(0.3, device.hang_up).start()
    with pytest.raises(DeviceError, match="ended the connection"):
        phone.tap((0.5, 0.5))
    assert shell.log.count("input tap 1 2") == 1


def test_a_device_that_died_is_given_up_after_the_deadline(troubled: Any) -> None:
    _, device, phone = troubled
    device.stop()
    started = time.monotonic()
    with pytest.raises(DeviceError):
        phone.screenshot()
        phone.screenshot()
    assert time.monotonic() - started < 12


def test_without_an_adb_server_the_error_says_how_to_start_one() -> None:
    with pytest.raises(DeviceError, match="adb start-server"):
        AdbPhone("emulator-5554", server_port=free_port())


def test_a_serial_adb_does_not_know_is_named(adb_port: int) -> None:
    with pytest.raises(DeviceGone, match="emulator-5999"):
        AdbPhone("emulator-5999", server_port=adb_port)


def test_real_adb_sees_the_device_and_captures_it(
    embedded_over_adb: EmbeddedOverAdb, adb_port: int, tmp_path: Any
) -> None:
    serial = embedded_over_adb.device.serial
    command = ["adb", "-P", str(adb_port), "-s", serial]
    shown = subprocess.run([*command, "exec-out", "screencap", "-p"], capture_output=True, check=True, timeout=20)
    assert shown.stdout.startswith(b"\x89PNG")
    failed = subprocess.run([*command, "shell", shlex.join(["no-such-command"])], capture_output=True, timeout=20)
    assert failed.returncode == 127


class Screens:
    """A capture that gives out frames one after the other, the last for ever."""

    def __init__(self, *values: int) -> None:
        self.left = list(values)
        self.looks = 0

    def __call__(self) -> np.ndarray:
        self.looks += 1
        value = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        return np.full((20, 20, 3), value, np.uint8)


def test_a_screen_is_taken_when_two_frames_agree() -> None:
    screens = Screens(1, 2, 3, 3, 4)
    assert settled(screens, 5.0, 0.0)[0, 0, 0] == 3
    assert screens.looks == 4


def test_a_screen_that_never_rests_is_taken_at_the_deadline() -> None:
    numbers = iter(range(10**6))
    started = time.monotonic()
    settled(lambda: np.full((2, 2, 3), next(numbers) % 251, np.uint8), 0.2, 0.01)
    assert 0.2 <= time.monotonic() - started < 2


def test_a_blinking_caret_is_no_movement() -> None:
    frames = [np.zeros((100, 100, 3), np.uint8) for _ in range(2)]
    frames[1][:10, 0] = 255  # 0.1% of the screen
    looks = iter(frames * 50)
    assert settled(lambda: next(looks), 5.0, 0.0) is frames[1]


def test_a_device_that_is_turned_is_tapped_where_it_shows(serve: Serve, adb_port: int, tmp_path: Any) -> None:
    from envs.android.environment import AndroidEnv

    shell = Troubled()
    pictures = [np.zeros((40, 20, 3), np.uint8), np.zeros((20, 40, 3), np.uint8)]
    turned = [False]

    def answer(command: str) -> tuple[int, bytes]:
        return (0, _png(pictures[turned[0]])) if command.startswith("screencap") else shell(command)

    tasks = tmp_path / "tasks.txt"
    tasks.write_text("Turn the phone\n")
    device = {"serial": serve(answer).serial, "server_port": adb_port, "settle_s": 0}
    env = AndroidEnv(tasks=str(tasks), driver="adb", device=device, evaluator=f"{__name__}:Undecided")
    env.reset(seed=1)
    turned[0] = True
    utterance = '{"action": "click", "coordinate": [900, 500]}'
    observation = env.step(utterance)[0]
    assert observation["image"].shape == (40, 20, 3) == env.observation_space["image"].shape
    env.step(utterance)
    assert [line for line in shell.log if "tap" in line] == ["input tap 18 20", "input tap 36 10"]


class Undecided:
    """An evaluator of one's own, named `module:Class`."""

    def verdict(self, moment: Any) -> Any:
        from envs.android.evaluators.base import NOT_YET

        return NOT_YET


@pytest.mark.parametrize(
    "request_of_a_page",
    [b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 30\r\n\r\n" + b"CNXN" * 20, b"GET / HTTP/1.1\r\n\r\n"],
)
def test_a_web_page_cannot_speak_to_the_device_server(request_of_a_page: bytes) -> None:
    """It listens on loopback, where every page that the user's browser shows can send HTTP."""
    shell = Troubled()
    device = ServedDevice(shell)
    try:
        with socket.create_connection(("127.0.0.1", device.port), 10) as link:
            link.sendall(request_of_a_page)
            link.shutdown(socket.SHUT_WR)
            link.settimeout(10)
            assert link.recv(100) == b""
    finally:
        device.stop()
    assert not shell.log
