"""The notebook on influence runs from its first cell to its last, on a run that was trained here."""

from __future__ import annotations

import math
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests.cluster.conftest import Coso

NOTEBOOK = Path("examples/influence.ipynb")
ESTIMATORS = ("scm", "gradient", "parser", "scm+parser", "uniform")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def run(coso: Coso) -> Path:
    """A small run of NumberLine, whose causal model has learnt something."""
    words = ["scoring.scm.pretrain_rounds=40", "training.updates=1", "training.steps_per_update=64"]
    return coso.train("small", *words)


@pytest.mark.end_to_end
def test_every_cell_runs_and_shows_what_it_says(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RUN", str(run))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(tmp_path / "kernel"))
    began = time.monotonic()
    NotebookClient(notebook, km=kernel, timeout=120).execute()
    assert time.monotonic() - began < 60
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    (table,) = [output.text for output in outputs if output.get("text", "").startswith("estimator")]
    rows = {line.split()[0]: [float(figure) for figure in line.split()[1:]] for line in table.splitlines()[1:]}
    assert tuple(rows) == ESTIMATORS
    assert rows["parser"] == [1.0, 1.0, 1.0], "the parser agrees with itself, and looks at the action part only"
    assert 0.0 <= rows["scm"][1] <= 1.0 and 0.0 <= rows["scm"][2] < 1.0, "the SCM looks at the thought too"
    assert math.isnan(rows["uniform"][0]), "there is nothing to rank"


def test_the_notebook_is_saved_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [output.output_type for cell in code for output in cell.outputs]
    assert "error" not in kinds and kinds.count("display_data") + kinds.count("execute_result") == 4
