"""An environment in its own process: every end has a reason, every wait a deadline, and nothing is left behind."""

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import envs  # noqa: F401  (registers coso/...)
from actors.images import RecentImages, decode_png, image_hash
from actors.rollouts.environment_host import EnvironmentFailure, EnvironmentHost
from actors.rollouts.environment_process import (
    LENGTH,
    PID,
    frame,
    serve_environment,
    with_encoded_image,
    with_image_bytes,
)
from envs.settings import EnvironmentSettings
from tests.envs_for_tests import TROUBLED

pytestmark = pytest.mark.integration

ADD = '{"thoughts": "", "action": "+"}'
NUMBER_LINE = "coso/NumberLine-v0"


def host_of(env_id: str, **settings: Any) -> EnvironmentHost:
    return EnvironmentHost(EnvironmentSettings(id=env_id, **settings))


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario, which no fault may make wait for ever, and see that it leaves no process behind."""
    before = environment_processes()
    asyncio.run(asyncio.wait_for(scenario(), 120))
    wait_until(lambda: environment_processes() <= before, "the environment processes to end")


def environment_processes() -> set[int]:
    """Pids of the processes that the fork server of this process has forked."""
    fork_servers = [p for p in psutil.Process().children() if "actors.rollouts.environment_process" in p.cmdline()]
    return {child.pid for fork_server in fork_servers for child in fork_server.children()}


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s} s for {what}"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_hosted_environment_does_what_it_does_in_this_process() -> None:
    async def scenario() -> None:
        host = host_of(NUMBER_LINE, kwargs={"max_position": 7})
        await host.start()
        local = gymnasium.make(NUMBER_LINE, max_position=7)
        assert host.label_space == local.unwrapped.label_space
        assert host.pid not in (None, os.getpid())
        for seed in range(3):
            observation, info = await host.reset(seed)
            expected, expected_info = local.reset(seed=seed)
            assert info == expected_info
            over = False
            while not over:
                image = observation["image"]
                assert np.array_equal(decode_png(image.png), expected["image"])
                assert image.key == image_hash(expected["image"])
                assert observation["prompt"] == expected["prompt"]
                utterance = local.unwrapped.expert_utterance(np.random.default_rng(seed), noise=0.5)
                observation, *rest, info = await host.step(utterance)
                expected, *expected_rest, expected_info = local.step(utterance)
                assert rest == expected_rest
                assert pickle.dumps(info) == pickle.dumps(expected_info)
                over = rest[1] or rest[2]
        _, info = await host.reset(0, {"state": {"current": 1, "target": 6}})
        assert info["state"] == {"current": 1, "target": 6}
        await host.close()

    run(scenario)


def test_a_picture_crosses_the_socket_once_and_never_as_an_array() -> None:
    ours, theirs = socket.socketpair()
    process = threading.Thread(target=serve_environment, args=(theirs,), daemon=True)
    process.start()
    ours.settimeout(30)
    _, descriptors, _, _ = socket.recv_fds(ours, PID.size, 1)
    os.close(descriptors[0])

    def ask(method: str, **arguments: Any) -> tuple[Any, int]:
        ours.sendall(frame((method, arguments)))
        length = LENGTH.unpack(ours.recv(LENGTH.size, socket.MSG_WAITALL))[0]
        status, result = pickle.loads(ours.recv(length, socket.MSG_WAITALL))
        assert status == "ok", result
        return result, length

    ask("make", env_id=NUMBER_LINE, kwargs={"invalid_action": "noop"}, module_path=list(sys.path))
    (observation, _), length = ask("reset", seed=0, options={"state": {"current": 1, "target": 4}})
    key, png = observation["image"]
    assert len(png) < length < len(png) + 4000
    (observation, *_), length = ask("step", action="no action, so the screen stays")
    assert observation["image"] == (key, None) and length < 4000
    (observation, *_), _ = ask("step", action=ADD)
    other, png = observation["image"]
    assert other != key and png is not None
    (observation, *_), _ = ask("reset", seed=1, options={"state": {"current": 1, "target": 4}})
    assert observation["image"] == (key, None)  # seen before, in another episode
    ours.sendall(frame(("close", None)))
    process.join(30)
    ours.close()


@given(numbers=st.lists(st.integers(0, 5), max_size=40))
def test_process_and_host_always_agree_on_what_the_host_holds(numbers: list[int]) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (4, 5, 3), np.uint8) for _ in range(6)]
    capacity = 400  # bytes: three or four of the pictures
    at_host: RecentImages[bool] = RecentImages(capacity)
    held: RecentImages[bytes] = RecentImages(capacity)
    for number in numbers:
        sent = with_encoded_image({"prompt": "p", "image": pictures[number]}, at_host)
        key, png = with_image_bytes(sent, held)["image"]
        assert key == image_hash(pictures[number])
        assert np.array_equal(decode_png(png), pictures[number])


def test_a_killed_process_is_told_as_died_and_the_host_restarts() -> None:
    async def scenario() -> None:
        host = host_of("coso/SlowNumberLine-v0", kwargs={"mean_ms": 60_000, "sigma": 0.0})
        await host.start()
        await host.reset(0)
        pid = host.pid
        assert pid is not None
        step = asyncio.create_task(host.step(ADD))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(EnvironmentFailure, match=f"process {pid}.*step") as failure:
            await step
        assert failure.value.reason == "died"
        assert time.monotonic() - started < 5
        assert host.pid is None
        with pytest.raises(RuntimeError, match="not running"):
            await host.step(ADD)
        await host.restart()
        assert host.pid != pid
        await host.reset(0)
        await host.close()

    run(scenario)


@pytest.mark.parametrize(
    ("utterance", "reason", "words"),
    [
        ("please die", "died", "ended during step"),
        ("please hang", "timeout", r"did not answer step in 3 s"),
        ("please raise", "error", "RuntimeError: the emulator lost its screen .*envs_for_tests.py"),
        ("please send a lock", "error", "cannot pickle"),
        ("please exit", "error", "SystemExit: no licence found .*envs_for_tests.py"),
        ("please interrupt", "error", "KeyboardInterrupt"),
        ("please raise without words", "error", "Speechless: .no message"),
        ("please raise half a character", "error", "RuntimeError: typed \ufffd!"),
        ("please leave", "died", "ended during step"),
        ("please close files", "died", "ended during step"),
    ],
)
def test_each_way_to_fail_has_its_reason_and_ends_the_process(utterance: str, reason: str, words: str) -> None:
    async def scenario() -> None:
        host = host_of(TROUBLED, deadline_s=3)
        await host.start()
        await host.reset(0)
        pid = host.pid
        assert pid is not None
        with pytest.raises(EnvironmentFailure, match=words) as failure:
            await host.step(utterance)
        assert failure.value.reason == reason and len(str(failure.value).encode()) < 4000
        wait_until(lambda: gone(pid), "the failed process to end")
        await host.restart()
        await host.reset(0)
        assert (await host.step(ADD))[4]["valid"]
        await host.close()

    run(scenario)


def test_threads_and_output_of_an_environment_harm_nothing() -> None:
    async def scenario() -> None:
        host = host_of(TROUBLED, deadline_s=10)
        await host.start()
        await host.reset(0)
        for utterance in ("please print", "please work in threads", ADD):
            await host.step(utterance)
        await host.close()

    run(scenario)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "reason", "words"),
    [
        (TROUBLED, {"start": "raise"}, "error", "OSError: no emulator image"),
        (TROUBLED, {"start": "exit"}, "error", "SystemExit: no licence"),
        (TROUBLED, {"start": "hang"}, "timeout", "did not answer make in 8 s"),
        ("coso/NoSuchGame-v0", {}, "error", "NoSuchGame"),
        ("CartPole-v1", {}, "error", "no label_space"),
        (NUMBER_LINE, {"max_position": 0}, "error", "max_position must be"),
    ],
)
def test_an_environment_that_cannot_start_says_why(
    env_id: str, kwargs: dict[str, object], reason: str, words: str
) -> None:
    async def scenario() -> None:
        warm = host_of(NUMBER_LINE)
        await warm.start()
        host = host_of(env_id, kwargs=kwargs, start_deadline_s=8)
        with pytest.raises(EnvironmentFailure, match=words) as failure:
            await host.start()
        assert failure.value.reason == reason
        assert host.pid is None
        await warm.close()

    run(scenario)


def test_close_closes_the_environment_and_ends_its_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        host = host_of(TROUBLED, kwargs={"marks": str(tmp_path)})
        await host.start()
        pid = host.pid
        assert pid is not None
        await host.close()
        assert (tmp_path / "closed").exists()
        assert gone(pid)
        await host.close()

    run(scenario)


def test_close_ends_a_process_that_will_not_close() -> None:
    async def scenario() -> None:
        host = host_of(TROUBLED, kwargs={"close_hangs": True}, deadline_s=1.0)
        await host.start()
        pid = host.pid
        assert pid is not None
        await host.close()
        wait_until(lambda: gone(pid), "the process that hangs in close to end")

    run(scenario)


def test_close_in_the_middle_of_a_step_ends_the_step() -> None:
    async def scenario() -> None:
        host = host_of(TROUBLED)
        await host.start()
        await host.reset(0)
        step = asyncio.create_task(host.step("please hang"))
        await asyncio.sleep(0.1)
        await host.close()
        with pytest.raises(EnvironmentFailure, match="died"):
            await step

    run(scenario)


def test_a_cancelled_step_leaves_nothing_to_be_mistaken_for_the_next_answer() -> None:
    async def scenario() -> None:
        host = host_of("coso/SlowNumberLine-v0", kwargs={"mean_ms": 300, "sigma": 0.0})
        await host.start()
        await host.reset(0)
        step = asyncio.create_task(host.step(ADD))
        await asyncio.sleep(0.05)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        assert host.pid is None
        await host.restart()
        _, info = await host.reset(0, {"state": {"current": 0, "target": 5}})
        assert info["state"] == {"current": 0, "target": 5}
        await host.close()

    run(scenario)


def test_a_second_call_at_once_is_refused_and_harms_nothing() -> None:
    async def scenario() -> None:
        host = host_of("coso/SlowNumberLine-v0", kwargs={"mean_ms": 200, "sigma": 0.0})
        await host.start()
        await host.reset(0)
        step = asyncio.create_task(host.step(ADD))
        await asyncio.sleep(0.02)
        with pytest.raises(RuntimeError, match="busy with step"):
            await host.reset(1)
        assert (await step)[4]["valid"]
        await host.close()

    run(scenario)


def test_sixty_four_environments_step_at_the_same_time_without_a_thread_each() -> None:
    async def scenario() -> None:
        hosts = [host_of("coso/SlowNumberLine-v0", kwargs={"mean_ms": 300, "sigma": 0.0}) for _ in range(64)]
        threads = threading.active_count()
        await asyncio.gather(*(host.start() for host in hosts))
        await asyncio.gather(*(host.reset(seed) for seed, host in enumerate(hosts)))
        started = time.monotonic()
        results = await asyncio.gather(*(host.step(ADD) for host in hosts))
        took_s = time.monotonic() - started
        assert threading.active_count() == threads
        assert len({host.pid for host in hosts}) == 64
        assert all(result[4]["valid"] for result in results)
        # One after another they would take 64 * 0.3 = 19 s.
        assert 0.3 <= took_s < 12
        await asyncio.gather(*(host.close() for host in hosts))

    run(scenario)


def test_ensure_running_waits_as_the_settings_say_and_forgets_after_a_good_episode() -> None:
    async def scenario() -> None:
        host = host_of(TROUBLED, restart_backoff_s=0.2, quarantine_after=3, quarantine_s=1.5)

        async def seconds_to_start() -> float:
            started = time.monotonic()
            await host.ensure_running()
            return time.monotonic() - started

        await host.ensure_running()
        pid = host.pid
        await host.ensure_running()
        assert host.pid == pid
        for expected_s in (0.2, 0.4, 1.5, 1.5):
            await host.reset(0)
            with pytest.raises(EnvironmentFailure):
                await host.step("please die")
            assert host.quarantined == (expected_s == 1.5)
            assert await seconds_to_start() >= expected_s - 0.05
        await host.reset(0)
        await host.step(ADD)
        await host.reset(1)
        with pytest.raises(EnvironmentFailure):
            await host.step("please die")
        assert not host.quarantined
        assert 0.15 <= await seconds_to_start() < 1.4  # not the quarantine's
        await host.close()

    run(scenario)


def test_the_fork_server_is_replaced_when_it_dies() -> None:
    async def scenario() -> None:
        host = host_of(NUMBER_LINE)
        await host.start()
        assert host.pid is not None
        environment = psutil.Process(host.pid)
        fork_server = environment.parent()
        assert fork_server is not None
        fork_server.kill()
        psutil.wait_procs([environment], timeout=30)  # the kernel ends it with its parent, but not in the same moment
        with pytest.raises(EnvironmentFailure, match="died"):
            await host.reset(0)
        await host.restart()
        await host.reset(0)
        await host.close()

    run(scenario)


DRIVER = """
import asyncio, os, sys
from actors.rollouts.environment_host import EnvironmentHost
from envs.settings import EnvironmentSettings
from tests.envs_for_tests import TROUBLED

async def main():
    settings = EnvironmentSettings(id=TROUBLED)
    host = EnvironmentHost(settings)
    await host.start()
    await host.reset(0)
    hang = asyncio.create_task(host.step("please hang"))
    idle = EnvironmentHost(settings)
    await idle.start()
    print(host.pid, idle.pid, flush=True)
    if sys.argv[1] == "wait":
        await hang

asyncio.run(main())
"""


@pytest.mark.parametrize("ending", ["wait", "leave"])
def test_no_process_outlives_its_driver(ending: str) -> None:
    """Whether the driver is killed or ends without closing its hosts, one of which hangs."""
    root = Path(__file__).parents[3]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, ending], stdout=subprocess.PIPE, cwd=root, text=True)
    assert driver.stdout is not None
    try:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        if ending == "wait":
            fork_server = psutil.Process(pids[0]).parent()
            assert fork_server is not None
            pids.append(fork_server.pid)
    finally:
        if ending == "wait":
            driver.kill()
        driver.wait(20)
    driver.stdout.close()
    wait_until(lambda: all(gone(pid) for pid in pids), "the processes of a dead driver to end")


def test_a_driver_without_main_guard_is_not_run_again(tmp_path: Path) -> None:
    """What a driver does at import must not happen once more in each environment's process."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER + "\nprint('once', flush=True)\n")
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, str(script), "leave"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once") == 1


def test_a_failure_survives_pickling_as_between_actors() -> None:
    failure = pickle.loads(pickle.dumps(EnvironmentFailure("timeout", "no answer")))
    assert (failure.reason, failure.detail) == ("timeout", "no answer")
    assert str(failure) == "environment timeout: no answer"
