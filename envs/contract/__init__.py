"""Checks that an environment, or a driver of phones, keeps its contract: for its author, and for whoever uses it.

    python -m pytest --pyargs envs.contract --env module:Name-v0
    python -m pytest --pyargs envs.contract --driver module:Class --driver-option serial=emulator-5554

or `check_environment` and `check_driver`, which return the same results as a list. Each check runs in a process of its
own kind, as a run's environments do: an environment that hangs, exits or closes files fails its check and no other.
"""

from envs.contract.result import Result
from envs.contract.session import check_driver, check_environment

__all__ = ["Result", "check_driver", "check_environment"]
