"""Pytest's options for `--pyargs envs.contract`. An entry point loads this module before the command line is read."""

from __future__ import annotations

import pytest

PACKAGE = "envs.contract"


def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    # Other runs of pytest keep their own options: `--env` may be one of theirs.
    if not _asked(args):
        return
    group = parser.getgroup("coso-rl", "the contract of environments and phone drivers")
    group.addoption("--env", metavar="ID", help="gymnasium id of the environment, or module:Name-v0")
    group.addoption("--env-kwarg", metavar="KEY=VALUE", action="append", default=[], help="its keyword arguments")
    group.addoption("--utterance", metavar="TEXT", action="append", default=[], help="a valid utterance of it")
    group.addoption("--driver", metavar="NAME", help="driver of phones: a name, or module:Class")
    group.addoption("--driver-option", metavar="KEY=VALUE", action="append", default=[], help="its keyword arguments")
    group.addoption("--deadline", metavar="S", type=float, default=30.0, help="of one reset or step, seconds")
    group.addoption("--check-deadline", metavar="S", type=float, default=120.0, help="of one check, seconds")


def _asked(arguments: list[str]) -> bool:
    return any(argument.partition("::")[0] in (PACKAGE, f"{PACKAGE}.test_contract") for argument in arguments)


def pytest_configure(config: pytest.Config) -> None:
    if not (config.getoption("--env", None) or config.getoption("--driver", None)) and _asked(config.args):
        raise pytest.UsageError("name what to test: --env ID (module:Name-v0), or --driver NAME (module:Class)")
