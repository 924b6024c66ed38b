"""metrics.jsonl and TensorBoard: every row readable, also after a crash, and a resumed run has each row once."""

from __future__ import annotations

import json
import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.run.run_folder import RunFolder
from cluster.telemetry.metrics import MetricsWriter, read_metrics, without_timings
from scoring.calibration import of_probabilities


@pytest.fixture()
def config(tmp_path: Path) -> RunConfig:
    return validate({"folder": str(tmp_path), "name": "run"})


@pytest.fixture()
def run(config: RunConfig) -> RunFolder:
    return RunFolder.create(config)


def write(run: RunFolder, config: RunConfig, rows: list[dict[str, Any]], resume_from: int | None = None) -> None:
    if resume_from is not None:
        time.sleep(1.1)  # TensorBoard reads its files in the order of the seconds they began in
    writer = MetricsWriter(run.path, config, resume_from)
    for row in rows:
        writer.write(row)
    writer.close()


def events(run: RunFolder, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(run.path / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_rows_read_back_as_written_one_json_object_a_line(run: RunFolder, config: RunConfig) -> None:
    write(run, config, [{"update": 0, "a/b": 0.5}, {"update": 1, "a/b": np.float32(0.25), "n": np.int64(3)}])
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == read_metrics(run.metrics)
    assert read_metrics(run.metrics) == [{"update": 0, "a/b": 0.5}, {"update": 1, "a/b": 0.25, "n": 3}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_what_is_not_finite_is_null_so_that_any_json_reader_takes_the_file(
    run: RunFolder, config: RunConfig, value: float
) -> None:
    write(run, config, [{"update": 1, "loss": value, "fine": 1.0}])

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(run.metrics.read_text(), parse_constant=refuse) == {"update": 1, "loss": None, "fine": 1.0}
    assert events(run, "fine") == [(1, 1.0)]


def test_tensorboard_shows_every_number_at_its_update(run: RunFolder, config: RunConfig) -> None:
    write(run, config, [{"update": 1, "rollout/success": 0.5}, {"update": 4, "rollout/success": 0.75}])
    assert events(run, "rollout/success") == [(1, 0.5), (4, 0.75)]


def test_points_of_a_reliability_curve_are_in_the_rows_and_not_in_tensorboard(
    run: RunFolder, config: RunConfig
) -> None:
    points = of_probabilities([0.5, 0.9], [True, True]).metrics("scm/")
    write(run, config, [{"update": 1, "scm/ece": 0.3, **points}])
    assert read_metrics(run.metrics)[0].items() >= points.items()
    reader = EventAccumulator(str(run.path / "tensorboard"))
    reader.Reload()
    assert reader.Tags()["scalars"] == ["scm/ece"]


def test_a_last_line_that_a_crash_cut_off_is_left_out(run: RunFolder, config: RunConfig) -> None:
    rows = [{"update": number, "x": number / 3} for number in range(3)]
    write(run, config, rows)
    text = run.metrics.read_text()
    last = len(text.splitlines()[-1])
    for cut in range(2, last + 1):
        run.metrics.write_text(text[:-cut])
        assert read_metrics(run.metrics) == rows[:2]
    assert read_metrics(run.path / "nowhere.jsonl") == []


def test_a_resumed_run_drops_the_rows_it_makes_again(run: RunFolder, config: RunConfig) -> None:
    write(run, config, [{"update": number, "x": float(number)} for number in range(5)])
    with run.metrics.open("a") as file:
        file.write('{"update": 5, "x"')  # and then the power went
    write(run, config, [{"update": 3, "x": 30.0}], resume_from=2)
    assert [(row["update"], row["x"]) for row in read_metrics(run.metrics)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    assert events(run, "x") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_run_resumed_without_a_checkpoint_starts_its_metrics_anew(run: RunFolder, config: RunConfig) -> None:
    write(run, config, [{"update": number, "x": 1.0} for number in range(3)])
    write(run, config, [{"update": 0, "x": 2.0}], resume_from=0)  # it measures its start again
    assert [(row["update"], row["x"]) for row in read_metrics(run.metrics)] == [(0, 2.0)]
    assert events(run, "x") == [(0, 2.0)]


def test_a_resumed_run_may_have_no_metrics_yet(run: RunFolder, config: RunConfig) -> None:
    write(run, config, [], resume_from=0)
    assert read_metrics(run.metrics) == []


def test_only_measurements_of_the_machine_are_timings() -> None:
    row = {"update": 1, "rollout/success": 0.5, "timeliness": 1.0, "lag/mean": 0.0}
    machine = {f"{prefix}/x": 1.0 for prefix in ("time", "speed", "memory", "queue", "bytes", "mean_seconds")}
    assert without_timings([row | machine]) == [row]


def test_wandb_that_is_not_installed_is_told_with_how_to_get_it(
    tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as where it is not installed
    config = validate({"folder": str(tmp_path), "name": "run", "logging": {"wandb_project": "p"}})
    with pytest.raises(CosoError, match="pip install wandb"):
        MetricsWriter(run.path, config)


def test_an_evaluation_beside_training_joins_the_row_of_its_update(run: RunFolder, config: RunConfig) -> None:
    rows = [
        {"update": 1, "a/b": 0.5, "recoveries": 0},
        {"update": 1, "recoveries": 1, "evaluation/success": 0.75},
        {"update": 2, "a/b": 0.25},
    ]
    write(run, config, rows)
    expected = [{"update": 1, "a/b": 0.5, "recoveries": 1, "evaluation/success": 0.75}, {"update": 2, "a/b": 0.25}]
    assert read_metrics(run.metrics) == expected
    assert events(run, "evaluation/success") == [(1, 0.75)]
    write(run, config, [], resume_from=1)
    assert read_metrics(run.metrics) == expected[:1]


def test_a_resumed_run_continues_its_wandb_run(tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    # wandb is an optional dependency that needs an account; what matters here is the id that it is given.
    given = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **arguments: given.append(arguments) or types.SimpleNamespace(finish=lambda: None)  # type: ignore[attr-defined]
    wandb.Error = RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = validate({"folder": str(tmp_path), "name": "run", "logging": {"wandb_project": "p"}})
    MetricsWriter(run.path, config).close()
    MetricsWriter(run.path, config, resume_from=0).close()
    first, second = (arguments["id"] for arguments in given)
    assert first == second and len(first) == 8
    assert {arguments["resume"] for arguments in given} == {"allow"}


def test_a_damaged_line_costs_no_other_line(
    run: RunFolder, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    write(run, config, [{"update": number, "a": number / 2} for number in range(4)])
    whole = run.metrics.read_bytes().splitlines()
    damage = [b"\xff\xfe", b"[" * 100_000, b"[1]", b'{"a": 1}', b'{"update": "3"}', b"", b"null"]
    run.metrics.write_bytes(b"\n".join([whole[0], whole[1][:9], *damage, *whole[2:], whole[1][:5]]))
    assert read_metrics(run.metrics) == [{"update": number, "a": number / 2} for number in (0, 2, 3)]
    assert "8 lines are no metrics and are left out, the first is line 2" in caplog.text
