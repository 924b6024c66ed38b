"""Options of the test run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--serial",
        default=None,
        help="also run the phone drivers' conformance tests on this device of the adb server on port 5037",
    )
