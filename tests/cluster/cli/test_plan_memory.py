"""`coso plan`: its table of memory, and the settings that docs/gpu.md suggests. No Ray starts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from tests.cluster.launch.test_sizing import qwen2_5_vl_7b, qwen2_vl_2b

PAGE = Path(__file__).parents[3] / "docs" / "gpu.md"
MODELS: dict[str, Callable[[Path], Path]] = {"2": qwen2_vl_2b, "7": qwen2_5_vl_7b}
#: Of the page: (what a block is for, its YAML).
BLOCKS = re.findall(
    r"^```yaml\n# (\d B, [^\n]*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
WIDE = {"COLUMNS": "220"}


def plan(*words: str | Path) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, words)], env=WIDE)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def nodes_file(folder: Path, count: int, gpus: int, gpu_memory: int = 80, memory: int = 1000) -> Path:
    file = folder / "nodes.yaml"
    node = f"{{name: gpu, count: {count}, cpus: 96, gpus: {gpus}, gpu_memory: {gpu_memory}, memory: {memory}}}"
    file.write_text(f"nodes: [{node}]")
    return file


@pytest.mark.parametrize(("title", "settings"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_the_settings_to_begin_with_fit(title: str, settings: str, tmp_path: Path) -> None:
    found = re.fullmatch(r"(\d) B, (?:(\d) nodes × )?(\d) GPUs?", title)
    assert found, title
    size, count, gpus = found.groups()
    (tmp_path / "run.yaml").write_text(settings)
    nodes = nodes_file(tmp_path, int(count or 1), int(gpus))
    text = plan(tmp_path / "run.yaml", f"model.path={MODELS[size](tmp_path / 'model')}", "--nodes", nodes)
    assert "memory, GiB" in text and "disk: a checkpoint takes" in text
    assert "memory: " not in text, text  # a line for each thing that is too much


def test_the_page_has_settings_for_each_size_and_machine() -> None:
    machines = ("1 GPU", "2 GPUs", "8 GPUs", "2 nodes × 8 GPUs")
    assert [title for title, _ in BLOCKS] == [f"{size} B, {machine}" for size in MODELS for machine in machines]


def test_what_is_too_much_is_in_the_table_and_in_a_line(tmp_path: Path) -> None:
    model = qwen2_5_vl_7b(tmp_path / "model")
    words = [f"model.path={model}", "model.dtype=bfloat16", "policy_server.device=cuda", "learner.device=cuda"]
    text = plan(*words, "--nodes", nodes_file(tmp_path, 1, 2, gpu_memory=24, memory=12))
    assert "│ GPU of a learner rank │" in text and "│ GPU of a policy server │" in text
    assert "memory: too much for 24.0 GiB of a GPU of 24.0 GiB: learner rank:" in text and "Try " in text
    assert "memory: too much for gpu's own 12.0 GiB: models: 15.4 GiB (loading the learner 15.4)" in text


def test_without_a_model_or_a_size_of_the_gpus_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "nodes.yaml").write_text("nodes: [{name: gpu, cpus: 8, gpus: 2}]")
    words = ("policy_server.device=cuda", "learner.device=cuda", "--nodes", tmp_path / "nodes.yaml")
    assert "memory: unknown. " in plan(f"model.path={tmp_path}", *words)
    rows = plan(f"model.path={qwen2_vl_2b(tmp_path / 'model')}", *words)
    assert re.search(r"│ GPU of a learner rank │ [\d.]+ │ \? │", rows)
