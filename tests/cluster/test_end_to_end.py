"""Whole runs through the command line: determinism, resume, recovery from kills, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.telemetry.metrics import read_metrics, without_timings
from tests.cluster.conftest import Coso

pytestmark = pytest.mark.timeout(600)

#: Ends the runs' names. Shared memory is the machine's, and other test sessions run there, or were killed there.
OURS = str(os.getpid())
SYNC = ["configs/sync.yaml", "training.updates=4", "training.checkpoint_every=2", "training.evaluate_every=2"]


def wait_until(condition: Callable[[], Any], deadline_s: float, what: str, process: subprocess.Popen[str]) -> Any:
    """The condition's first true value; fails when the deadline passes or the run ends before."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        if process.poll() is not None:
            output = process.stdout.read() if process.stdout else ""
            pytest.fail(f"the run ended while waiting for {what}:\n{output}")
        time.sleep(0.2)
    process.kill()
    pytest.fail(f"{what} did not happen within {deadline_s:.0f} s")


def last_update(run: Path) -> int:
    rows = read_metrics(run / "metrics.jsonl")
    return int(rows[-1]["update"]) if rows else -1


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def member(process: subprocess.Popen[str], pattern: str) -> psutil.Process | None:
    """A process of the run whose title or command line matches."""
    for child in family(process):
        try:
            if re.search(pattern, " ".join(child.cmdline())):
                return child
        except psutil.Error:
            continue
    return None


def assert_nothing_left(members: list[psutil.Process], run: Path, driver: int, semaphores_before: set[str]) -> None:
    """No process, shared-memory file or temporary folder of the run. Other runs on this machine are let alone."""
    _, alive = psutil.wait_procs(members, timeout=20)
    alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not alive, f"processes of the run are left: {[(p.pid, p.cmdline()) for p in alive]}"
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"coso-{run.name}-")]
    assert semaphores() <= semaphores_before
    assert not [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(f"coso-{driver}-")]


def addresses_open_to_the_network(process: subprocess.Popen[str]) -> list[str]:
    """Where processes of the run listen, other than on loopback."""
    members = {process.pid, *(child.pid for child in family(process))}
    return [
        f"{connection.laddr} of {psutil.Process(connection.pid).name()}"
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and connection.pid in members
        and not connection.laddr.ip.removeprefix("::ffff:").startswith("127.")
        and connection.laddr.ip != "::1"
    ]


def semaphores() -> set[str]:
    """Semaphores and segments in shared memory that no living process maps. What runs beside this one use is mapped."""
    found = {}
    for path in Path("/dev/shm").iterdir():
        if path.name.startswith(("sem.mp", "psm_")):
            with contextlib.suppress(FileNotFoundError):  # another run's, gone meanwhile
                found[path] = path.stat().st_ino
    mapped: set[int] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process has ended
            mapped |= {int(line.split()[4]) for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return {path.name for path, inode in found.items() if inode not in mapped and path.exists()}


def test_sync_mode_repeats_itself_and_resumes_as_if_never_interrupted(coso: Coso, tiny_model: Path) -> None:
    before = semaphores()
    first = coso.train(f"first-{OURS}", *SYNC)
    rows = without_timings(read_metrics(first / "metrics.jsonl"))
    assert [row["update"] for row in rows] == [0, 1, 2, 3, 4]

    # The second run of the same seed is killed after its checkpoint, driver first, as a machine's reboot would.
    second = coso.folder / f"second-{OURS}"
    model = coso.folder / "model"
    shutil.copytree(tiny_model, model)
    process = coso.start("train", *coso.words, f"model.path={model}", f"name={second.name}", *SYNC)
    wait_until(lambda: last_update(second) >= 3, 240, "update 3", process)
    members = family(process)
    process.kill()
    process.wait(30)
    psutil.wait_procs(members, timeout=30)
    assert (second / "checkpoints/step_2/progress.json").exists()
    before_resume = without_timings(read_metrics(second / "metrics.jsonl"))
    assert before_resume == rows[: len(before_resume)], "the same seed gave other metrics"

    # It goes on at another place, seen from another folder, and without the model that it began with.
    killed, second = second, coso.folder / "moved" / f"again-{OURS}"
    second.parent.mkdir()
    killed.rename(second)
    shutil.rmtree(model)
    coso.run("resume", second.name, cwd=second.parent)
    assert without_timings(read_metrics(second / "metrics.jsonl")) == rows
    summaries = [json.loads((run / "summary.json").read_text()) for run in (first, second)]
    for key in ("success_before", "success_after", "env_steps", "updates", "eval_episodes"):
        assert summaries[0][key] == summaries[1][key]
    assert "complete" in coso.run("resume", str(second), expect=1)
    # Not even of the killed driver, whose leftovers the resumed run removes.
    for run in (killed, second):
        assert_nothing_left(members, run, process.pid, before)


def test_two_of_each_survive_every_kind_of_kill_and_leave_nothing(coso: Coso) -> None:
    before = semaphores()
    run = coso.folder / f"killed-{OURS}"
    words = [
        *coso.words,
        "configs/two-of-each.yaml",
        "environment.id=coso/SlowNumberLine-v0",
        "environment.kwargs={invalid_action: penalty, mean_ms: 50}",
        f"name={run.name}",
        "rollout.envs_per_worker=4",
        "learner.minibatch=16",
        "learner.micro_batch=8",
        "training.updates=16",
        "training.checkpoint_every=4",
        "training.evaluate_every=0",
    ]
    process = coso.start("train", *words)
    wait_until(lambda: last_update(run) >= 1, 280, "the first update", process)
    assert addresses_open_to_the_network(process) == []
    kills = [
        ("policy server", r"^ray::PolicyServer"),
        ("environment", r"actors\.rollouts\.environment_process"),
        ("scorer", r"^ray::Scorer"),
        ("learner", r"^ray::LearnerRank"),
    ]
    everyone: dict[int, psutil.Process] = {}
    for kind, pattern in kills:
        everyone |= {child.pid: child for child in family(process)}
        victim = wait_until(lambda pattern=pattern: member(process, pattern), 60, f"a {kind}", process)
        if kind == "environment":
            victim = max((c for c in family(process) if re.search(pattern, " ".join(c.cmdline()))), key=lambda c: c.pid)
        os.kill(victim.pid, signal.SIGKILL)
        goal = min(last_update(run) + 2, 16)
        wait_until(lambda goal=goal: last_update(run) >= goal, 200, f"going on without the {kind}", process)
    everyone |= {child.pid: child for child in family(process)}
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["updates"] == 16
    for kind, _ in kills:
        assert summary["recoveries_by_kind"].get(kind, 0) >= 1, summary
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "ecover" in report
    assert_nothing_left(list(everyone.values()), run, process.pid, before)


def test_a_policy_server_that_restarts_is_met_and_sent_the_weights_again_where_they_are_broadcast(coso: Coso) -> None:
    run = coso.folder / f"broadcast-{OURS}"
    words = [
        *coso.words,
        f"name={run.name}",
        "weight_sync.transport=gloo",
        "entropy.mode=none",
        "training.updates=4",
        "training.evaluate_every=0",
    ]
    process = coso.start("train", *words)
    wait_until(lambda: last_update(run) >= 1, 280, "the first update", process)
    # The only server: without the weights there is no batch, and without a batch no update that would publish them.
    victim = wait_until(lambda: member(process, r"^ray::PolicyServer"), 60, "a policy server", process)
    os.kill(victim.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["updates"] == 4 and summary["recoveries_by_kind"] == {"policy server": 1}


def test_interrupting_a_run_ends_everything_and_saves_what_was_saved(coso: Coso) -> None:
    before = semaphores()
    run = coso.folder / f"stopped-{OURS}"
    words = [*coso.words, f"name={run.name}", "training.updates=1000", "training.checkpoint_every=1"]
    process = coso.start("train", *words)
    wait_until(lambda: (run / "checkpoints/step_1/progress.json").exists(), 280, "a checkpoint", process)
    members = family(process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130, output
    assert_nothing_left(members, run, process.pid, before)
    assert read_metrics(run / "metrics.jsonl")


def test_an_evaluation_prints_its_figures_and_nothing_else(coso: Coso) -> None:
    words = [*coso.words, "--episodes", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", "eval", *words], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["evaluation/episodes"] == 4 and 0 <= figures["evaluation/success"] <= 1
    assert "evaluating" in done.stderr
