"""A warm-started model and a way to run the `coso` command, as a user would, for the end-to-end tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

# A shell starts what it runs in the background with Ctrl-C ignored, and a process passes that on to those it starts;
# a handler is not passed on, so runs that a test interrupts hear it however the tests were started.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: Small enough for a test: what it learns does not matter, that it answers in the right form does.
TINY = [
    "configs/numberline.yaml",
    "training.steps_per_update=24",
    "training.evaluation_episodes=8",
    "learner.minibatch=16",
    "learner.micro_batch=8",
    "algorithm.epochs=1",
    "rollout.envs_per_worker=4",
    "scoring.scm.hidden=16",
    "scoring.scm.layers=1",
    "scoring.scm.feedforward=32",
    "scoring.scm.pretrain_rounds=1",
    "scoring.scm.round_utterances=64",
    "logging.console=false",
]


class Coso:
    """Runs `coso` commands on the tiny model, in a folder of their own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.words = [*TINY, f"model.path={model}", f"folder={folder}"]

    def start(self, command: str, *words: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        paths = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.cli.main", command, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths))},
        )

    def run(
        self, command: str, *words: str, expect: int = 0, deadline_s: float = 280.0, cwd: Path | None = None
    ) -> str:
        """The command's output; fails the test where it ends otherwise than expected."""
        process = self.start(command, *words, cwd=cwd)
        try:
            output, _ = process.communicate(timeout=deadline_s)
        finally:
            process.kill()
        assert process.returncode == expect, output
        return output

    def train(self, name: str, *words: str, **options: object) -> Path:
        self.run("train", *self.words, f"name={name}", *words, **options)  # type: ignore[arg-type]
        return self.folder / name


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `coso warmstart` makes in a few steps, once for all processes of the test run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    model = folder / "warm" / "model"
    with FileLock(folder / "warm.lock"):
        if not model.exists():
            coso = Coso(model.parent, model)
            output = coso.run(
                "warmstart",
                *coso.words,
                f"warm_start.output={model}",
                "warm_start.demonstrations=200",
                "warm_start.steps=60",
                "warm_start.vision_steps=10",
            )
            assert str(model) in output
    return model


@pytest.fixture
def coso(tmp_path: Path, tiny_model: Path) -> Iterator[Coso]:
    yield Coso(tmp_path / "runs", tiny_model)
