"""Pytest's options for `--pyargs envs.contract`. An entry point loads this module before the command line is read."""

from __future__ import annotations

from typing import Any

import pytest

PACKAGE = "envs.contract"


def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    # Other runs of pytest keep their own options: `--env` may be one of theirs.
    if not any(argument.partition("::")[0].rstrip("/").endswith((PACKAGE, "envs/contract")) for argument in args):
        return
    group = parser.getgroup("coso-rl", "the contract of environments and phone drivers")
    group.addoption("--env", metavar="ID", help="gymnasium id of the environment, or module:Name-v0")
    group.addoption("--env-kwarg", metavar="KEY=VALUE", action="append", default=[], help="its keyword arguments")
    group.addoption("--utterance", metavar="TEXT", action="append", default=[], help="a valid utterance of it")
    group.addoption("--driver", metavar="NAME", help="driver of phones: a name, or module:Class")
    group.addoption("--driver-option", metavar="KEY=VALUE", action="append", default=[], help="its keyword arguments")
    group.addoption("--deadline", metavar="S", type=float, default=30.0, help="of one reset or step, seconds")
    group.addoption("--check-deadline", metavar="S", type=float, default=120.0, help="of one check, seconds")


def pytest_generate_tests(metafunc: Any) -> None:
    if metafunc.module.__name__ != f"{PACKAGE}.test_contract":
        return
    from envs.contract.session import DRIVER_CHECK_NAMES, ENVIRONMENT_CHECK_NAMES

    names = {"environment_check": ENVIRONMENT_CHECK_NAMES, "driver_check": DRIVER_CHECK_NAMES}
    for argument, checks in names.items():
        if argument in metafunc.fixturenames:
            asked = metafunc.config.getoption("--env" if argument == "environment_check" else "--driver", None)
            metafunc.parametrize(argument, checks if asked else [], scope="session")
