"""The layers of the test run, how it is spread over processes, the Ray session that its tests share, and its options.

Layers, from light to heavy: `unit`, `integration`, `end_to_end` (pyproject.toml says what each is). Most tests need no
marker: a test belongs to the layer of the heaviest fixture that it uses. Tests that start processes without a fixture
carry a marker, mostly one for the whole file. Lighter layers run first, so that most failures show within minutes.
`-n auto` (pytest-xdist) runs two tests at a time where the machine has two cores and the memory for two whole runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from typing import Any

import hypothesis
import psutil
import pytest

# The tests' models are so small that a second thread of torch costs more than it gains. Set before torch is imported;
# processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `ci` is the default: the same examples each time, and no limit on the time of one, since the machine may be busy.
# `--hypothesis-profile=thorough` looks for new examples, ten times as many where a test names no number of its own.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)
hypothesis.settings.load_profile("ci")

LAYERS = ("unit", "integration", "end_to_end")
#: Fixtures that start programs, and the layer of the tests that use them.
LAYER_OF_FIXTURE = {
    "ray_cluster": "integration",
    "needs_browser": "integration",
    "adb_port": "integration",
    "games_folder": "integration",
    "tiny_model": "end_to_end",
}
#: A test of the unit layer that takes longer is named at the end of the run, seconds.
UNIT_LIMIT_S = 10.0
#: Memory that a whole run of the tiny model takes, with a margin, bytes.
RUN_BYTES = 6 * 2**30


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--serial",
        default=None,
        help="also run the phone drivers' conformance tests on this device of the adb server on port 5037",
    )


@pytest.hookimpl(optionalhook=True)  # a hook of pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    fitting = psutil.virtual_memory().available // RUN_BYTES
    return max(1, min(2, len(os.sched_getaffinity(0)), fitting))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class LayerByLayer(LoadScopeScheduling):
        """The tests of a file share fixtures: one worker runs those of one layer, after those of the layers before."""

        @cached_property
        def scopes(self) -> dict[str, str]:
            files = groupby(self.collection, key=lambda nodeid: nodeid.partition("::")[0])
            return {nodeid: f"{file} {number}" for number, (file, block) in enumerate(files) for nodeid in block}

        def _split_scope(self, nodeid: str) -> str:
            return self.scopes[nodeid]

    config.option.loadscopereorder = False  # keep the order of the layers
    return LayerByLayer(config, log)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        layer, marked = layer_of(item), {layer for layer in LAYERS if item.get_closest_marker(layer)}
        if marked - {layer}:
            raise pytest.UsageError(f"{item.nodeid} is marked {sorted(marked)} but belongs to the layer {layer}")
        item.add_marker(layer)
    items.sort(key=lambda item: LAYERS.index(layer_of(item)))


def layer_of(item: pytest.Item) -> str:
    """The heaviest of the item's own marker and its fixtures."""
    found = {layer for layer in LAYERS if item.get_closest_marker(layer)}
    found |= {LAYER_OF_FIXTURE[name] for name in getattr(item, "fixturenames", ()) if name in LAYER_OF_FIXTURE}
    return max(found, key=LAYERS.index, default="unit")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What each layer took, summed over its tests (two may have run at a time), and which unit tests were slow."""
    seconds = dict.fromkeys(LAYERS, 0.0)
    slow = []
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            layer = next(layer for layer in LAYERS if layer in report.keywords)
            seconds[layer] += report.duration
            if layer == "unit" and report.duration > UNIT_LIMIT_S:
                slow.append(f"slow unit test: {report.duration:.0f} s in {report.when} of {report.nodeid}")
    took = ", ".join(f"{layer} {value:.0f}" for layer, value in seconds.items() if value)
    if took:
        terminalreporter.section(f"seconds by layer: {took}")
    for line in slow:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a user has started is remembered in a folder of the tests' own, also by processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """The module `ray`, connected to a local Ray of the run's own: it takes 5 s to start, so all tests share it.

    Ray keeps what actors print in its session's folder: printed here, it would mix with what other tests capture.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()
