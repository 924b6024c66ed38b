"""Environments that keep the contract pass every check; each with a fault fails the check that is made for it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from typing import Any

import gymnasium
import psutil
import pytest

from envs.contract import check_environment
from envs.contract.environment_checks import ENVIRONMENT_CHECKS
from envs.contract.player import Environment, Player
from envs.contract.result import Broken
from envs.contract.session import Session, Subject
from envs.contract.trace import replay
from tests.envs.contract import broken_environments as broken
from tests.envs.contract.broken_environments import subject

#: Checks that play for longer; they run where they are asked for.
LONG = {"times", "memory"}


def check(name: str, environment: Environment) -> Any:
    """One check in this process."""
    if name != "determinism":
        return ENVIRONMENT_CHECKS[name](environment)

    def again(script: Any) -> Any:
        with Player(environment) as player:
            return replay(player, script)

    return ENVIRONMENT_CHECKS[name](environment, again)


def faults(environment: Environment, names: set[str]) -> dict[str, str]:
    found = {}
    for name in ENVIRONMENT_CHECKS:
        if name in names:
            try:
                check(name, environment)
            except Broken as error:
                found[name] = str(error)
    return found


@pytest.mark.parametrize("game", ["NumberLine", "Blackjack", "EZPoints", "Points24"])
def test_our_games_keep_the_contract(game: str) -> None:
    environment = Environment(f"coso/{game}-v0", play_s=1.0)
    assert faults(environment, {*ENVIRONMENT_CHECKS} - {"memory"}) == {}


@pytest.mark.parametrize(
    ("game", "failing", "words"),
    [
        (broken.NoLabels, "makes", "has no label_space .*TextActionEnv"),
        (broken.NotANumber, "outputs", r"reward = nan .*, expected a finite.*reset\(seed=1\), then 2 steps, then"),
        (broken.NoSuccess, "outputs", "info without 'success', only 'action'"),
        (broken.PlainBox, "spaces", "observation_space must be a Dict with 'image' and 'prompt', not Box"),
        (broken.FewCharacters, "spaces", "action_space does not contain .*use envs.spaces.AnyText"),
        (broken.Grows, "spaces", r"'image'\] is outside of .* it is uint8 \(13, 16, 3\). Its shape"),
        (broken.Encodes, "utterances", r"step\('.udc00|ud83d'\) raises UnicodeEncodeError.* in parse\)"),
        (broken.LabelsOfTheInvalid, "utterances", "is invalid, but .* labels .0.: they must be .* all -1"),
        (broken.TwoParsers, "parser", r"parser.parse\(.*\) says .* let step use parse"),
        (broken.ExpertWithoutWords, "expert", "switch it.* is invalid"),
        (broken.ExpertWithTheGamesChance, "expert", "it must draw only from the generator it gets"),
        (broken.GlobalChance, "determinism", r"in a new environment: seed 1, reset: observation\['image'\]"),
        (broken.LiveImage, "copies", r"image of reset\(seed=1\), then step\(.*\) changed when .* return copies"),
        (broken.Endless, "ends", "has no end after 2000 steps.*Give the environment a horizon"),
        (broken.SpoiledByAStepTooMany, "after_the_end", "beyond the episode's end .* image differs"),
        (broken.RemembersTheLastEpisode, "resets", "in the middle of an episode .* image differs"),
        (broken.ClosesOnce, "closes", "close.., close.*RuntimeError: closed already"),
        (broken.NoOptions, "outputs", r"reset\(seed=1\) raises TypeError: .* unexpected keyword argument 'options'"),
        (broken.LockInInfo, "pickles", "cannot pickle '_thread.lock'.*Put plain values"),
    ],
)
def test_each_fault_fails_its_check(game: type[gymnasium.Env], failing: str, words: str) -> None:
    found = faults(subject(game, play_s=5.0), {*ENVIRONMENT_CHECKS} - LONG)
    assert failing in found and re.search(words, found[failing]), found


def test_the_same_game_without_a_fault_passes() -> None:
    assert faults(subject(broken.Sound, play_s=2.0), {*ENVIRONMENT_CHECKS}) == {}


def test_slow_steps_and_growth_are_found() -> None:
    assert "a step takes 0.1 s, but" in faults(subject(broken.Slow, deadline_s=0.05, play_s=0.3), {"times"})["times"]
    message = faults(subject(broken.KeepsPictures, play_s=2.0), {"memory"})["memory"]
    assert "python bytes grow without end: by " in message and "broken_environments.py" in message
    assert "files grow without end" in faults(subject(broken.KeepsFiles, play_s=2.0), {"memory"})["memory"]


@pytest.mark.parametrize(
    ("game", "check_name", "words"),
    [
        (broken.Hangs, "outputs", ["did not come to an end in 4 s; it is in _act (", "broken_environments.py"]),
        (broken.Leaves, "outputs", ["ended with exit code 3", "the emulator has no licence"]),
        (broken.Crashes, "outputs", ["was killed by SIGSEGV"]),
        (broken.ClosesFiles, "outputs", ["its process"]),
        (broken.OrderOfASet, "determinism", ["in another process: seed 1, reset: observation['prompt'] differs"]),
    ],
)
def test_an_environment_that_takes_its_process_along_fails_alone(
    game: type[gymnasium.Env], check_name: str, words: list[str]
) -> None:
    check_s = 4.0 if game is broken.Hangs else 60.0
    with Session(Subject("environment", subject(game).env_id, check_s=check_s)) as session:
        result = session.run(check_name)
        assert not result.ok
        for each in words:
            assert each in result.message
        if game is broken.Crashes:
            assert session.run("makes").ok  # in a new process


def test_the_list_of_results_and_what_is_left_out() -> None:
    seen = []
    results = check_environment(
        subject(broken.Sound).env_id, skip=["memory", "times", "gymnasium_checker"], report=seen.append, play_s=2.0
    )
    assert results == seen and all(result.ok for result in results), results
    assert [each.name for each in results] == [
        name for name in ENVIRONMENT_CHECKS if name not in ("memory", "times", "gymnasium_checker")
    ]
    assert results[0].measured["make_s"] > 0 and results[0].seconds > 0
    assert results[0].summary.startswith("make_s ") and "label_heads 1" in results[0].summary
    (only,) = check_environment("coso/NoSuchGame-v0")
    assert (only.name, only.ok) == ("makes", False) and "NoSuchGame" in only.message
    with pytest.raises(ValueError, match="no checks nonsense to skip; the checks are makes"):
        check_environment("coso/NumberLine-v0", skip=["nonsense"])


PARENT = """
import sys, threading, time
from envs.contract.session import Session, Subject
session = Session(Subject("environment", sys.argv[1]))
threading.Thread(target=session.run, args=("outputs",), daemon=True).start()
while session._process is None:
    time.sleep(0.01)
print(session._process.pid, flush=True)
time.sleep(60)
"""


def test_no_process_outlives_a_parent_that_is_killed() -> None:
    words = [sys.executable, "-c", PARENT, subject(broken.Hangs).env_id]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        ends = time.monotonic() + 60
        while "envs.contract.worker" not in child.cmdline() or child.cpu_times().user < 0.1:
            assert time.monotonic() < ends
            time.sleep(0.05)
        parent.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
