"""Work takes only idle cores until somebody waits for it, whatever the user may do."""

import os
import subprocess
import sys

import pytest

from scoring.pool.priority import TwoPriorities


@pytest.mark.integration  # another process imports torch
def test_a_user_without_privileges_can_raise_and_lower_work():
    """Such a user may not take a thread out of the idle policy."""
    code = """if True:
        import os
        from scoring.pool.priority import TwoPriorities
        if os.geteuid() == 0:
            os.seteuid(65534)  # which drops the privileges
        priority = TwoPriorities("cpu")
        for priority.waited_for in (False, True, False):
            print(priority.run(os.sched_getscheduler, 0), priority.run(os.getpriority, os.PRIO_PROCESS, 0))
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    expected = [f"{policy} {niceness}" for policy in (os.SCHED_IDLE, os.SCHED_OTHER, os.SCHED_IDLE)]
    assert ended.stdout.splitlines() == expected, ended.stderr


def test_work_for_a_gpu_is_never_lowered():
    assert TwoPriorities("cuda").run(os.sched_getscheduler, 0) == os.sched_getscheduler(0)


def test_where_the_idle_policy_is_refused_the_highest_niceness_is_set(monkeypatch):
    def refused(*_):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    priority = TwoPriorities("cpu")
    assert priority.run(os.getpriority, os.PRIO_PROCESS, 0) == 19
    priority.waited_for = True
    assert priority.run(os.getpriority, os.PRIO_PROCESS, 0) == os.getpriority(os.PRIO_PROCESS, 0)
