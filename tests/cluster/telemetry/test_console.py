"""The live console: what it shows, and that a log without a terminal gets plain lines."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console as Terminal

from cluster.telemetry.catalogue import SECTIONS, describe, mebibytes, show
from cluster.telemetry.console import BLOCKS, Console, duration, seconds_left, sparkline


def screen(console: Console, width: int = 100) -> str:
    terminal = Terminal(record=True, width=width, file=io.StringIO())
    terminal.print(console.render())
    return terminal.export_text()


def test_screen_shows_progress_stage_numbers_and_curves() -> None:
    console = Console("numberline · seed 1", 10, True, io.StringIO())
    console.update({"update": 0, "evaluation/success": 0.5})
    for update in (1, 2, 3):
        console.update(
            {"update": update, "rollout/success": 0.25 * update, "learner/entropy": 1 / update, "recoveries": 2.0}
        )
    console.update({"update": 4, "evaluation/success": 0.875, "queue/bytes": 3 * 2**20, "speed/tokens_per_s": 1234.5})
    console.stage("update 5: training on 256 steps")
    text = screen(console)
    assert "numberline · seed 1" in text
    assert "update 4 of 10" in text and "left" in text
    assert "update 5: training on 256 steps" in text
    assert "0.500 → 0.875" in text
    assert "1,234" in text and "3072 KiB" in text
    assert any(block in text for block in BLOCKS)


def test_last_evaluation_stays_and_other_numbers_do_not_outlive_their_update() -> None:
    console = Console("run", 10, True, io.StringIO())
    console.update({"update": 0, "evaluation/success": 0.5, "learner/gradient_norm": 0.777})
    console.update({"update": 1})
    text = screen(console)
    assert "0.500 → 0.500" in text and "0.777" not in text


def test_an_evaluation_beside_training_joins_the_numbers_of_its_update() -> None:
    console = Console("run", 10, True, io.StringIO())
    console.update({"update": 4, "rollout/success": 0.125})
    console.update({"update": 4, "evaluation/success": 0.875})
    assert "0.125" in screen(console) and "0.875" in screen(console)


def test_what_is_no_finite_number_is_left_out() -> None:
    console = Console("run", 3, True, io.StringIO())
    rows = {"rollout/return": None, "learner/entropy": float("nan"), "rollout/success": np.float32(0.25), "x": "y"}
    console.update({"update": 1, **rows})
    text = screen(console)
    assert "nan" not in text and "0.250" in text


def test_title_and_texts_are_not_taken_for_markup() -> None:
    console = Console("[red]run[/red]", 3, True, io.StringIO())
    console.stage("[link=x]stage")
    text = screen(console)
    assert "[red]run[/red]" in text and "[link=x]stage" in text


@pytest.mark.parametrize("width", [60, 80, 160])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    console = Console("a run with a long name " * 4, 10, True, io.StringIO())
    for update in range(100):
        console.update({"update": update, "rollout/success": update / 100, "rollout/return": -update})
    assert max(map(len, screen(console, width).splitlines())) <= width


def test_without_a_terminal_there_are_plain_lines_and_nothing_else() -> None:
    file = io.StringIO()
    with Console("run", 2, True, file) as console:
        console.stage("starting Ray")
        console.update({"update": 0, "evaluation/success": 0.5})
        console.stage("collecting")
        console.update({"update": 1, "rollout/success": 0.75, "learner/approx_kl": 0.01})
        console.message("policy server 0 was restarted [pid 3] " + "x" * 200)
    lines = file.getvalue().splitlines()
    assert lines[:4] == [
        "run",
        "starting Ray",
        "update 0/2  held-out success 0.500",
        "update 1/2  success 0.750  KL to the sampling policy 0.01",
    ]
    assert lines[4] == "policy server 0 was restarted [pid 3] " + "x" * 200
    assert len(lines) == 5 and "\x1b" not in file.getvalue()


def test_live_screen_starts_stops_and_takes_calls_from_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    before = set(threading.enumerate())
    with Console("run", 5, True, file) as console:
        threads = [threading.Thread(target=console.message, args=(f"message {i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        console.update({"update": 1, "rollout/success": 0.5})
        for thread in threads:
            thread.join(10)
    written = file.getvalue()
    assert all(f"message {i}" in written for i in range(8))
    assert "update 1 of 5" in written
    refreshing = [
        thread for thread in set(threading.enumerate()) - before if type(thread).__module__.startswith("rich")
    ]
    for thread in refreshing:  # told to stop, and perhaps not at its end yet
        thread.join(10)
    assert not any(thread.is_alive() for thread in refreshing)


def test_sparkline_of_a_ramp_rises_through_every_block() -> None:
    assert sparkline(range(8), 8) == BLOCKS
    assert sparkline([0.5], 10, (0.0, 1.0)) in BLOCKS[3:5]
    assert sparkline([2.0, 2.0], 10) == BLOCKS[0] * 2
    assert sparkline([], 10) == ""


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 80))
def test_sparkline_fits_its_width(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values)) and set(line) <= set(BLOCKS)


def test_time_left_is_counted_from_where_the_run_was_taken_up() -> None:
    assert seconds_left([(10, 100.0), (15, 150.0)], 25) == pytest.approx(100.0)
    assert seconds_left([(10, 100.0)], 25) is None
    assert seconds_left([(0, 1.0), (0, 2.0)], 25) is None
    assert (duration(45), duration(200), duration(3720)) == ("45 s", "3 min 20 s", "1 h 02 min")


def test_every_metric_is_described_once() -> None:
    keys = [metric.key for section in SECTIONS.values() for metric in section]
    assert len(keys) == len(set(keys))
    assert all(metric.meaning.endswith(".") for section in SECTIONS.values() for metric in section)
    assert describe("memory/policy_server_0_mb").form == "mebibytes"
    assert describe("no/such").label == "no/such"


def test_numbers_are_shown_in_their_form() -> None:
    assert show("evaluation/success", 0.9) == "0.900"
    assert show("time/update", 0.25) == "250 ms" and show("time/update", 12.34) == "12.3 s"
    assert show("environment_steps", 12800) == "12,800"
    assert show("rollout/return", None) == "–"
    assert (mebibytes(0.5), mebibytes(300), mebibytes(2048)) == ("512 KiB", "300 MiB", "2.0 GiB")
