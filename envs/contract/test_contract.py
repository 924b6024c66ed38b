"""`python -m pytest --pyargs envs.contract --env module:Name-v0`: each check is a test. See `envs.contract`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from envs.contract.driver_checks import DRIVER_CHECKS
from envs.contract.environment_checks import ENVIRONMENT_CHECKS
from envs.contract.session import Session, Subject


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "environment_check" in metafunc.fixturenames:
        metafunc.parametrize(
            "environment_check", list(ENVIRONMENT_CHECKS) if metafunc.config.getoption("--env", None) else []
        )
    if "driver_check" in metafunc.fixturenames:
        metafunc.parametrize("driver_check", list(DRIVER_CHECKS) if metafunc.config.getoption("--driver", None) else [])


def options(config: pytest.Config, name: str) -> dict[str, Any]:
    """`KEY=VALUE` words as keyword arguments; values are YAML."""
    found = {}
    for word in config.getoption(name):
        key, equals, value = word.partition("=")
        if not equals:
            raise pytest.UsageError(f"{name} takes KEY=VALUE, not {word!r}")
        found[key] = yaml.safe_load(value)
    return found


@pytest.fixture(scope="session")
def environment_session(request: pytest.FixtureRequest) -> Iterator[Session]:
    config = request.config
    times = {"deadline_s": config.getoption("--deadline"), "check_s": config.getoption("--check-deadline")}
    subject = Subject(
        "environment",
        config.getoption("--env"),
        options(config, "--env-kwarg"),
        config.getoption("--utterance"),
        **times,
    )
    with Session(subject) as session:
        yield session


@pytest.fixture(scope="session")
def driver_session(request: pytest.FixtureRequest) -> Iterator[Session]:
    config = request.config
    arguments = options(config, "--driver-option")
    check_s = config.getoption("--check-deadline")
    with Session(Subject("driver", config.getoption("--driver"), arguments, check_s=check_s)) as session:
        yield session


@pytest.fixture(scope="session")
def made(environment_session: Session) -> bool:
    """Whether the environment can be made; without that no other check says anything."""
    return environment_session.run("makes").ok


def test_environment(environment_session: Session, environment_check: str, made: bool) -> None:
    if not made and environment_check != "makes":
        pytest.skip("the environment cannot be made: see test_environment[makes]")
    ask(environment_session, environment_check)


def test_driver(driver_session: Session, driver_check: str) -> None:
    ask(driver_session, driver_check)


def ask(session: Session, check: str) -> None:
    result = session.run(check)
    if not result.ok:
        pytest.fail(f"{session.subject.name}, {check}: {result.message}", pytrace=False)
    print(result.summary)
