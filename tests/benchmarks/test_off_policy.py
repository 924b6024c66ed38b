"""The study of old data: every update gets data of the pinned age, all runs take as many steps, figures are right."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import off_policy
from benchmarks.off_policy import PinnedLag, check_lags, finished, interval, markdown, table
from cluster.config.files import load_config, validate
from cluster.run.controller import Controller
from cluster.run.run_folder import Progress, RunFolder
from cluster.telemetry.console import Console
from cluster.telemetry.metrics import MetricsWriter, read_metrics
from tests.cluster.run.test_controller import Stages

UPDATES = 6


@pytest.mark.parametrize("lag", [0, 1, 4, 8])
def test_the_loop_trains_on_data_of_the_pinned_age(tmp_path: Path, lag: int) -> None:
    """The real controller's loop; what it drives notes the calls, and its episodes bear the version published last."""
    config = validate(
        {"folder": str(tmp_path), "name": "run", "mode": "sync", "entropy": {"mode": "none"},
         "training": {"updates": UPDATES, "evaluate_every": 0, "evaluation_episodes": 2}}
    )  # fmt: skip
    run = RunFolder.create(config)
    trained: list[str] = []

    class Fresh(Stages):
        collected = 0

        async def collect(self, update: int) -> Any:
            self.collected += 1
            return await super().collect(update)

        async def published(self, version: int) -> None:
            pass

        def update(self, batch: Any, index: int) -> dict[str, float]:
            trained.append(batch.column("episode")[0])
            return super().update(batch, index)

    async def whole() -> Fresh:
        system: Any = Fresh(config)
        system.collector = PinnedLag(lag, UPDATES, system)
        writer = MetricsWriter(run.path, config)
        try:
            await Controller(config, run, system, Progress(), writer, Console("test", UPDATES, False)).run()
        finally:
            writer.close()
        return system

    stages = asyncio.run(asyncio.wait_for(whole(), 60))
    rows = [row for row in read_metrics(run.metrics) if row["update"]]
    assert [row["lag/mean"] for row in rows] == [min(update, lag) for update in range(UPDATES)]
    assert trained == [f"e{update}" for update in range(1, UPDATES + 1)]  # each batch once, in order
    assert stages.collected == UPDATES  # at every lag
    check_lags(rows, lag)
    rows[-1]["lag/max"] += 1
    with pytest.raises(SystemExit, match=f"update {UPDATES} trained at a lag of"):
        check_lags(rows, lag)


def test_both_variants_are_settings_of_the_configs_of_the_games() -> None:
    for game, words in off_policy.GAMES.items():
        configs = [
            load_config([f"configs/{game}.yaml"], [*off_policy.WORDS, *words, variant])
            for variant in off_policy.VARIANTS.values()
        ]
        assert [config.algorithm.decoupled for config in configs] == [True, False]  # type: ignore[attr-defined]
        same = [config.model_dump() for config in configs]
        for values in same:
            del values["algorithm"]["decoupled"]
        assert same[0] == same[1]


def test_intervals_are_students() -> None:
    # By hand: mean 0.8, deviation 0.1, 4.303 · 0.1 / √3 = 0.2484.
    assert interval([0.7, 0.8, 0.9]) == {"seeds": 3, "mean": 0.8, "interval": [0.5516, 1.0484]}
    assert interval([0.5]) == {"seeds": 1, "mean": 0.5}
    assert interval([1.0, 1.0, 1.0])["interval"] == [1.0, 1.0]


def line(variant: str, seed: int, success: float, **rest: Any) -> dict[str, Any]:
    return {
        "game": "numberline", "lag": 4, "variant": variant, "seed": seed, "commit": "abc", "words": [],
        "in_training": [0.5, success - 0.1], "success_after": success,
        "env_steps": 2300 + seed, "valid_after": 1.0, "clip_fraction": 0.2, "approx_kl": 0.1,
        "importance_beyond_limit": 0.0, **rest,
    }  # fmt: skip


def test_the_table_compares_the_variants_seed_by_seed() -> None:
    runs = [line("decoupled", seed, success) for seed, success in [(1, 0.9), (2, 0.8)]]
    runs += [line("plain", seed, success) for seed, success in [(2, 0.7), (1, 0.6), (3, 0.0)]]
    row = table(runs)["numberline"]["4"]
    assert row["decoupled"]["success_after"]["mean"] == 0.85
    assert row["decoupled"]["success_in_training"]["mean"] == 0.625
    assert row["decoupled"]["of_seeds"] == {1: 0.9, 2: 0.8} and row["decoupled"]["env_steps"] == 2301.5
    assert row["difference"]["seeds"] == 2 and row["difference"]["mean"] == 0.2  # seed 3 has no partner
    assert markdown({"numberline": {"4": row}}) == [
        "| numberline | 4 | 0.850 (0.21 to 1.49) | 0.433 (-0.51 to 1.37) | 0.200 (-1.07 to 1.47) |"
    ]
    assert table(runs[2:])["numberline"]["4"].keys() == {"plain"}


def test_a_rerun_makes_only_the_runs_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[int, str]] = []

    def trained(key: dict[str, Any], words: list[str]) -> dict[str, Any]:
        made.append((key["lag"], key["variant"]))
        return {**key, "words": words}

    monkeypatch.setattr(off_policy, "FOLDER", tmp_path)
    monkeypatch.setattr(off_policy, "commit", lambda: "abc")
    monkeypatch.setattr(off_policy, "warm_started", lambda game: None)
    monkeypatch.setattr(off_policy, "trained", trained)
    runs = tmp_path / "runs.jsonl"
    runs.write_text(json.dumps(line("plain", 1, 0.5)) + "\n")
    call = ["off_policy", "run", "--games", "numberline", "--lags", "2,4", "--seeds", "1"]
    monkeypatch.setattr("sys.argv", [*call, "--at-most", "2"])
    off_policy.main()
    assert made == [(2, "decoupled"), (2, "plain")]
    monkeypatch.setattr("sys.argv", call)
    off_policy.main()
    assert made[2:] == [(4, "decoupled")]
    assert len(finished(runs)) == 4
