"""The scripts for GPUs: what runs of them without one, and the page that says what was run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import report, token_head
from benchmarks.record import record

SCRIPTS = Path("benchmarks/gpu")


def test_the_page_says_of_every_script_what_was_run() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.in_page(page) == page, "run python -m benchmarks.gpu.report --write"
    without_question = {"__init__", "card", "steps", "large_model", "report"}
    assert {path.stem for path in SCRIPTS.glob("*.py")} - without_question == set(report.SCRIPTS)
    for name in report.SCRIPTS:
        assert report.NOT_RUN in page or (report.RESULTS / f"{name}.json").exists()


def test_every_result_names_its_card_and_code() -> None:
    for path in report.RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["device"] == "cuda" and result["card"] and result["commit"] != "FILLED", path
        assert result["command"].startswith(f"python -m benchmarks.gpu.{path.stem}")


def test_the_token_heads_two_ways_agree_where_there_is_no_gpu() -> None:
    naive, chunked = (token_head.measured("cpu", chunk) for chunk in (0, 16))
    np.testing.assert_allclose(chunked["logprobs"], naive["logprobs"], atol=0.02)
    apart = np.linalg.norm(chunked["gradient"] - naive["gradient"]) / np.linalg.norm(naive["gradient"])
    assert apart < 0.01 and naive["rise_gib"] is None


def test_a_result_names_the_code_where_there_is_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "of a test")
    monkeypatch.setattr("sys.argv", [str(Path("benchmarks/gpu/learner.py").resolve()), "--device", "cpu"])
    written = record(tmp_path / "result.json", {"steps": 1})
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == written
    assert (written["commit"], written["command"]) == ("of a test", "python -m benchmarks.gpu.learner --device cpu")
