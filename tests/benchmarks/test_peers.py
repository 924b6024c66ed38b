"""What the comparison with a peer counts: the one-step task's rewards, CPU time of all processes, rates by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium
import pytest

from benchmarks import peers
from benchmarks.one_step import ID, STATES, right_action
from benchmarks.peers import Mark, rates, stage_of, watched

#: Burns 0.4 CPU seconds in itself and 0.4 in a child, notes an update, ends the child and notes another.
BURNER = """
import subprocess, sys, time
burn = "import time\\nwhile time.process_time() < 0.4: pass\\nprint(flush=True)\\ninput()"
child = subprocess.Popen([sys.executable, "-S", "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
while time.process_time() < 0.4: pass
child.stdout.readline()
for last in (False, True):
    if last:
        child.communicate("\\n")
    with open(sys.argv[1], "a") as marks:
        marks.write("update\\n")
    time.sleep(1.0)
"""


def test_the_action_that_leads_to_the_target_is_rewarded_and_ends_the_episode() -> None:
    environment = gymnasium.make(ID)
    assert len(STATES) == 24 and len({tuple(state.values()) for state in STATES}) == 24
    for state in STATES:
        for action in "+-":
            environment.reset(options={"state": state})
            _, reward, terminated, _, info = environment.step(f'{{"thoughts": "so", "action": "{action}"}}')
            closer = abs(state["target"] - state["current"] - (1 if action == "+" else -1))
            assert reward == float(closer < abs(state["target"] - state["current"])) and terminated
            assert info["success"] == (action == right_action(state))
    environment.reset(seed=3)
    _, reward, terminated, *_ = environment.step("no answer")
    assert (reward, terminated) == (0.0, True)


def test_cpu_time_is_that_of_a_program_and_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    path = tmp_path / "marks"
    marks = watched(
        [sys.executable, "-S", "-c", BURNER, str(path)],
        lambda: len(path.read_text().splitlines()) if path.exists() else 0,
        {},
    )
    assert len(marks) == 2 and marks[0].at < marks[1].at
    used, used_later = (sum(mark.cpu.values()) for mark in marks)
    assert 0.75 < used <= used_later < 5.0  # the child has ended and still counts
    with pytest.raises(SystemExit, match="failed: see .*output.log\nno such thing"):
        watched([sys.executable, "-S", "-c", "import sys; sys.exit('no such thing')"], lambda: 0, {})


def test_rates_are_those_between_the_warm_up_and_the_last_update() -> None:
    marks = [Mark(at, {"learner": cpu, "driver": 1.0}) for at, cpu in [(10, 4), (20, 8), (24, 12), (30, 20), (99, 99)]]
    found = rates(marks, [900, 900, 200, 220, 900])
    assert (found["updates"], found["samples"]) == (2, 420)
    assert found["samples_per_s"] == 42.0 and found["samples_per_cpu_s"] == 35.0 and found["cores_busy"] == 1.2
    assert found["cpu_ms_per_sample"] == {"driver": 0.0, "learner": pytest.approx(12_000 / 420)}


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        ("ray::LearnerRank.update", "learner"),
        ("VLLM::EngineCore", "policy server"),
        ("raylet --node", "Ray and others"),
    ],
)
def test_processes_are_told_apart_by_their_command_lines(command: str, stage: str) -> None:
    assert stage_of(command) == stage
