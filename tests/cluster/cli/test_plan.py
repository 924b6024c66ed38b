"""`coso plan` for nodes of a file and for this machine: its tables, and mistakes in one line. No Ray starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.main import app
from cluster.errors import CosoError
from cluster.launch.nodes import read_nodes

CONFIG = str(Path(__file__).parents[3] / "configs" / "numberline.yaml")
NODES = """
nodes:
- {name: gpu, count: 2, cpus: 32, gpus: 4, address: null}
- {name: box, count: 3, cpus: 16, emulators: 8}
"""
RATES = {"environment_s": 0.002, "first_answer_s": 0.2, "further_answer_s": 0.02, "scorer_s": 0.02, "rank_s": 0.03}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "nodes.yaml").write_text(NODES)
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    return tmp_path


def plan(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", CONFIG, *words])


def refused(*words: str) -> str:
    """The message of a command that ends with one."""
    result = plan(*words)
    assert isinstance(result.exception, CosoError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_the_table_says_what_goes_where_and_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]  # importing it would raise ImportError
    result = plan("--nodes", "nodes.yaml", "policy_server.device=cuda", "learner.device=cuda", "learner.ranks=4")
    assert result.exit_code == 0, result.output
    rows = {line.split("│")[1].strip(): line for line in result.output.splitlines() if line.startswith("│")}
    assert list(rows) == ["gpu-1 (driver)", "gpu-2", "box-1", "box-2", "box-3"]
    assert "4 learner ranks" in rows["gpu-1 (driver)"] and "4 / 4" in rows["gpu-1 (driver)"]
    assert "policy server" in rows["gpu-2"] and "1 / 4" in rows["gpu-2"]
    assert "policy servers reach the learner at gpu-1, weights travel by nccl" in result.output
    assert "no rates" in result.output


def test_with_rates_it_says_what_limits_and_what_more_would_change() -> None:
    result = plan("--nodes", "nodes.yaml", "--rates", "rates.json", "rollout.envs_per_worker=32", "mode=async")
    assert result.exit_code == 0, result.output
    assert "limited by learner (stages overlap)" in " ".join(result.output.split())
    changes = {line.split("│")[1].strip(): line for line in result.output.splitlines() if line.startswith("│")}
    assert "+0%" in changes["one more policy server"]
    assert "+17%" in changes["one more learner rank"]  # from 1 / 0.03 steps/s to 32 / (0.002 + 0.2 + 31 · 0.02)
    assert "64 more environments (2 rollout workers)" in changes


def test_what_is_short_is_in_the_table_and_in_one_line() -> None:
    words = ("--nodes", "nodes.yaml", "policy_server.device=cuda", "policy_server.tensor_parallel=8")
    assert "policy server 0 needs 1 CPU and 8 GPUs on one node, free are 4 GPUs on gpu-1 and gpu-2, 0 GPUs on each" in (
        refused(*words)
    )
    assert "nowhere" in plan(*words).output


def test_without_nodes_it_plans_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    result = plan("cluster.oversubscribe=16")
    assert result.exit_code == 0 and "127.0.0.1 (driver)" in result.output


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("nodes: []", "at least 1 item"),
        ("nodes: [{name: a}]", "nodes.0.cpus: Field required"),
        ("nodes: [{name: a, cpus: -1}]", "nodes.0.cpus"),
        ("- a", "the file: Input should be a valid dictionary"),
        ("nodes: [{name: a, cpus: 1}, {name: a, cpus: 1}]", "two nodes of the same name"),
        ("nodes: [{name: a, cpus: 1, count: 2, driver: true}]", "several nodes as driver"),
        ("nodes: [", "cannot be read"),
    ],
)
def test_a_file_of_nodes_that_is_wrong_is_refused_with_the_place(folder: Path, text: str, part: str) -> None:
    (folder / "nodes.yaml").write_text(text)
    assert part in refused("--nodes", "nodes.yaml")


def test_words_that_contradict_each_other_and_files_that_are_missing() -> None:
    assert "leave out --address and --measure" in refused("--nodes", "nodes.yaml", "--measure")
    assert "none.yaml does not exist" in refused("--nodes", "none.yaml")
    assert "none.json does not exist" in refused("--nodes", "nodes.yaml", "--rates", "none.json")


def test_the_driver_of_a_file_is_its_first_node_or_the_one_that_says_so(folder: Path) -> None:
    assert [node.name for node in read_nodes(folder / "nodes.yaml") if node.driver] == ["gpu-1"]
    (folder / "nodes.yaml").write_text("nodes: [{name: a, cpus: 1}, {name: b, cpus: 2, cores: 1, driver: true}]")
    a, b = read_nodes(folder / "nodes.yaml")
    assert (a.driver, b.driver, b.cores, b.free) == (False, True, 1.0, {"CPU": 2.0})
