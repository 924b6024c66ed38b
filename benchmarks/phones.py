"""Phones: speed, memory, scaling with slow devices, success of agents, and leaks over two thousand episodes.

    python -m benchmarks.phones scaling adb latency soak expert-general ... [--out benchmarks/results/phones.json]

Each part is measured separately and added to the result file. Needs Chromium; `adb` needs Debian's adb. A part takes
one to two minutes on two cores, `soak` eight.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from actors.rollouts.environment_host import EnvironmentFailure, EnvironmentHost
from benchmarks.phone_devices import SCREEN, serve_still
from envs.android.device import DeviceError
from envs.settings import EnvironmentSettings

ENV_ID = "coso/Android-v0"
PHONES = (1, 4, 16, 32)
SCALING_S = 10.0
SLOW_PHONES, SLOW_MEAN_S, SLOW_SIGMA = 256, 2.0, 0.5
LATENCY_S, LOCK_STEP_ROUNDS = 40.0, 6
SOAK_EPISODES, SOAK_PHONES, SOAK_FAILURES = 2000, 16, 0.01
SOAK_DEADLINE_S = 5.0


def tap_somewhere(rng: random.Random) -> str:
    """An answer that taps a random point."""
    return json.dumps({"action": "click", "coordinate": [rng.randrange(1001), rng.randrange(1001)]})


def tree(root: int) -> list[psutil.Process]:
    """A process and all its descendants, and the browser that its environments share."""
    found = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    # A hub whose first phone has ended is not a descendant, but its command line names its owner.
    owners = {str(process.pid) for process in found}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "envs.android.browser_hub" in words and owners & set(words) and process not in found:
            found += [process, *process.children(recursive=True)]
    return [process for process in found if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def usage(root: int) -> tuple[float, float]:
    """(CPU seconds so far, proportional memory in MB) of a process tree, without the root itself."""
    seconds = bytes_ = 0.0
    for process in tree(root)[1:]:
        try:
            times = process.cpu_times()
            seconds += times.user + times.system
            bytes_ += process.memory_full_info().pss
        except psutil.Error:
            continue
    return seconds, bytes_ / 1e6


async def begin(count: int, kwargs: dict[str, Any]) -> list[EnvironmentHost]:
    settings = EnvironmentSettings(id=ENV_ID, kwargs=kwargs, deadline_s=120, start_deadline_s=300)
    hosts = [EnvironmentHost(settings) for _ in range(count)]
    for start in range(0, count, 8):
        await asyncio.gather(*(host.start() for host in hosts[start : start + 8]))
    await asyncio.gather(*(host.reset(seed=number) for number, host in enumerate(hosts)))
    return hosts


async def end(hosts: list[EnvironmentHost]) -> None:
    await asyncio.gather(*(host.close() for host in hosts))


async def scaling() -> dict[str, Any]:
    """Steps per second, CPU time per step and memory of embedded phones at full speed."""
    rows = []
    for count in PHONES:
        hosts = await begin(count, {})
        ends = time.monotonic() + SCALING_S

        async def run(host: EnvironmentHost, number: int, ends: float) -> int:
            rng, steps = random.Random(number), 0
            while time.monotonic() < ends:
                _, _, terminated, truncated, _ = await host.step(tap_somewhere(rng))
                steps += 1
                if terminated or truncated:
                    await host.reset(seed=rng.randrange(2**20))
            return steps

        before, _ = usage(os.getpid())
        started = time.monotonic()
        steps = sum(await asyncio.gather(*(run(host, number, ends) for number, host in enumerate(hosts))))
        seconds = time.monotonic() - started
        after, megabytes = usage(os.getpid())
        await end(hosts)
        await asyncio.sleep(5)  # the browser ends some time after its last phone
        rows.append(
            {
                "phones": count,
                "steps_per_s": round(steps / seconds, 1),
                "cpu_ms_per_step": round(1000 * (after - before) / steps, 1),
                "memory_mb": round(megabytes),
            }
        )
        print(rows[-1], flush=True)
    first = rows[0]["memory_mb"]
    for row in rows[1:]:
        row["mb_per_phone_beyond_the_first"] = round((row["memory_mb"] - first) / (row["phones"] - 1), 1)
    return {"seconds_each": SCALING_S, "screen": SCREEN, "rows": rows}


def adb() -> dict[str, Any]:
    """Time of capture and tap through Debian's adb server, over loopback."""
    import multiprocessing
    import socket

    from envs.android.adb import AdbPhone
    from envs.android.adb_server import AdbServer

    program = shutil.which("adb")
    if program is None:
        raise SystemExit("adb is not installed (Debian: apt-get install adb)")
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    device = multiprocessing.get_context("spawn").Process(target=serve_still, args=(ports[1],), daemon=True)
    device.start()
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([program, "-P", str(ports[0]), "nodaemon", "server"], **quiet)
    try:
        serial = f"127.0.0.1:{ports[1]}"
        ends = time.monotonic() + 60
        while True:
            try:
                AdbServer(port=ports[0]).connect(serial, 5.0)
                break
            except DeviceError:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.2)
        result: dict[str, Any] = {"screen": SCREEN}
        for capture in ("png", "raw"):
            phone = AdbPhone(serial, server_port=ports[0], capture=capture, settle_s=0)  # type: ignore[arg-type]
            times = []
            for _ in range(200):
                started = time.perf_counter()
                phone.screenshot()
                phone.tap((0.5, 0.5))
                times.append(1000 * (time.perf_counter() - started))
            result[f"capture_and_tap_ms_{capture}"] = {
                "median": round(statistics.median(times), 2),
                "p95": round(statistics.quantiles(times, n=20)[-1], 2),
            }
        print(result, flush=True)
        return result
    finally:
        server.kill()
        server.wait()
        device.kill()
        device.join()


async def latency() -> dict[str, Any]:
    """Share of the ideal throughput with phones that step independently, and in lock-step."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks.txt"
        tasks.write_text("Wait\n")
        kwargs = {
            "tasks": str(tasks),
            "driver": "benchmarks.phone_devices:SlowDevice",
            "device": {"mean_s": SLOW_MEAN_S, "sigma": SLOW_SIGMA},
            "evaluator": "benchmarks.phone_devices:Never",
            "horizon": 10**6,
        }
        hosts = await begin(SLOW_PHONES, kwargs)
    rng = random.Random(0)

    async def step(host: EnvironmentHost) -> float:
        """Step once; returns the device's own time in seconds."""
        return -(await host.step(tap_somewhere(rng)))[1]

    async def own_pace(host: EnvironmentHost, ends: float) -> tuple[int, float]:
        steps, device_s = 0, 0.0
        while True:
            took = await step(host)
            now = time.monotonic()
            if now >= ends:
                # Of the action in progress at the end, count the part before the end.
                return steps, device_s + max(0.0, took - (now - ends))
            steps, device_s = steps + 1, device_s + took

    started = time.monotonic()
    counts = await asyncio.gather(*(own_pace(host, started + LATENCY_S) for host in hosts))
    steps, busy = (sum(column) for column in zip(*counts, strict=True))
    started = time.monotonic()
    locked = 0.0
    for _ in range(LOCK_STEP_ROUNDS):
        locked += sum(await asyncio.gather(*(step(host) for host in hosts)))
    lock_seconds = time.monotonic() - started
    await end(hosts)
    result = {
        "phones": SLOW_PHONES,
        "action_mean_s": SLOW_MEAN_S,
        "action_sigma": SLOW_SIGMA,
        "ideal_steps_per_s": SLOW_PHONES / SLOW_MEAN_S,
        "own_pace": {
            "steps_per_s": round(steps / LATENCY_S, 1),
            "share_of_ideal": round(busy / (SLOW_PHONES * LATENCY_S), 4),
        },
        "lock_step": {
            "steps_per_s": round(SLOW_PHONES * LOCK_STEP_ROUNDS / lock_seconds, 1),
            "share_of_ideal": round(locked / (SLOW_PHONES * lock_seconds), 4),
        },
        "share_of_ideal": "share of all device seconds in which a device was acting",
    }
    print(result, flush=True)
    return result


def agents(tasks: str, agent: str) -> dict[str, Any]:
    """Success of an agent on a task set: the expert on all tasks, a random agent and an idle agent on all test
    tasks."""
    halves = ("train", "test") if agent == "expert" else ("test",)
    result = {split: play_all(tasks, split, agent) for split in halves}
    print(tasks, agent, result, flush=True)
    return result


def play_all(tasks: str, split: str, agent: str) -> dict[str, Any]:
    """Play one episode of every task of a half."""
    from envs.android.environment import AndroidEnv

    env = AndroidEnv(tasks=tasks)
    rng = np.random.default_rng(1)
    succeeded = steps = 0
    every = env.tasks(split)  # type: ignore[arg-type]
    for number, task in enumerate(every):
        env.reset(seed=number, options={"state": {"task": task.name, "seed": number}})
        over = False
        while not over:
            if agent == "expert":
                utterance = env.expert_utterance(rng)
            else:
                utterance = env.random_action() if agent == "random" else "nothing"
            _, _, terminated, truncated, info = env.step(utterance)
            over = terminated or truncated
            steps += 1
        succeeded += info["success"]
    env.close()
    return {"tasks": len(every), "succeeded": succeeded, "steps_per_episode": round(steps / len(every), 2)}


async def soak() -> dict[str, Any]:
    """Thousands of short episodes with calls that fail at random: none may stall, leak or go uncounted."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "failures.txt"
        log.touch()
        kwargs = {
            "driver": "benchmarks.phone_devices:FlakyPhone",
            "device": {"log": str(log), "share": SOAK_FAILURES},
            "horizon": 4,
        }
        settings = EnvironmentSettings(id=ENV_ID, kwargs=kwargs, deadline_s=SOAK_DEADLINE_S)
        hosts = [EnvironmentHost(settings) for _ in range(SOAK_PHONES)]
        left = SOAK_EPISODES
        counted: Counter[str] = Counter()
        whole = cut_short = steps = 0
        longest = 0.0
        marks: list[dict[str, float]] = []

        async def run(host: EnvironmentHost, number: int) -> None:
            nonlocal left, whole, cut_short, steps, longest
            rng = random.Random(number)
            while left > 0:
                left -= 1
                if left % (SOAK_EPISODES // 8) == 0:
                    descriptors = psutil.Process().num_fds()
                    megabytes = usage(os.getpid())[1]
                    marks.append(
                        {
                            "episodes": SOAK_EPISODES - left,
                            "memory_mb": round(megabytes),
                            "descriptors_of_the_driver": descriptors,
                            "processes": len(tree(os.getpid())),
                        }
                    )
                    print(marks[-1], dict(counted), flush=True)
                started = time.monotonic()
                try:
                    await host.ensure_running()
                    await host.reset(seed=rng.randrange(2**20))
                    over = False
                    while not over:
                        _, _, terminated, truncated, _ = await host.step(tap_somewhere(rng))
                        over = terminated or truncated
                        steps += 1
                    whole += 1
                except EnvironmentFailure as failure:
                    counted[failure.reason] += 1
                    cut_short += 1
                longest = max(longest, time.monotonic() - started)

        started = time.monotonic()
        await asyncio.gather(*(run(host, number) for number, host in enumerate(hosts)))
        seconds = time.monotonic() - started
        made = Counter(log.read_text().split())
        await end(hosts)
    await asyncio.sleep(6)
    left_over = tree(os.getpid())[1:]
    result = {
        "episodes": whole + cut_short,
        "whole": whole,
        "ended_by_a_failure": cut_short,
        "failures_made": dict(sorted(made.items())),
        "failures_counted": dict(sorted(counted.items())),
        "every_failure_counted": made == counted,
        "steps": steps,
        "seconds": round(seconds),
        "longest_episode_s": round(longest, 1),
        "marks": marks,
        "processes_left_besides_the_fork_server": len(left_over) - 1,
    }
    print(result, flush=True)
    return result


PARTS: dict[str, Callable[[], Any]] = {
    "scaling": scaling,
    "adb": adb,
    "latency": latency,
    **{
        f"{agent}-{tasks}": partial(agents, tasks, agent)
        for agent in ("expert", "random", "nothing")
        for tasks in ("general", "webshop")
    },
    "soak": soak,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what to measure")
    parser.add_argument("--out", type=Path, help="JSON file to add the results to")
    chosen = parser.parse_args()
    for name in chosen.parts:
        result = PARTS[name]()
        if asyncio.iscoroutine(result):
            result = asyncio.run(result)
        if chosen.out is not None:
            kept = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
            measured = {"command": f"python -m benchmarks.phones {name}", "cores": psutil.cpu_count(), **result}
            chosen.out.write_text(json.dumps({**kept, name: measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
