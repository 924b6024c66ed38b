"""Demonstrations: what the expert did, in the trajectory schema, whole or not at all, and read back as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.images import decode_png
from actors.trajectory import STEP_SCHEMA, TrajectoryLog
from cluster.demonstrations import collect as demonstrations
from cluster.demonstrations.collect import ABOUT, Play, demonstrate, gather, load_demonstrations, write_demonstrations
from cluster.errors import CosoError

EZPOINTS = "coso/EZPoints-v0"


def a_play(**changes: Any) -> Play:
    return Play(**{"environment": EZPOINTS, "kwargs": {}, "seed": 3, "noise": 0.0, "habit": "", **changes})


def test_rows_are_the_experts_episodes_as_they_went() -> None:
    shown = gather(demonstrate(a_play(), 40))
    assert shown.batch.steps.schema.equals(STEP_SCHEMA) and len(shown.batch) == 40
    env: Any = gymnasium.make(EZPOINTS).unwrapped
    for steps in shown.batch.episode_slices()[:-1]:
        rows = shown.batch.steps.slice(steps.start, steps.stop - steps.start).to_pylist()
        observation, _ = env.reset(seed=rows[0]["seed"])
        for number, row in enumerate(rows):
            assert row["step"] == number and row["prompt"] == observation["prompt"]
            picture = np.asarray(decode_png(shown.batch.images[row["image"]]))
            assert np.array_equal(picture, observation["image"])
            index = steps.start + number
            assert shown.state_labels[index].tolist() == env.state_labels().tolist()
            observation, reward, terminated, truncated, info = env.step(row["utterance"])
            assert (row["reward"], row["terminated"], row["truncated"]) == (reward, terminated, truncated)
            assert (row["action"], row["action_labels"]) == (info["action"], info["action_labels"].tolist())
        assert terminated and reward == 10 and row["end_reason"] == "terminated"
    assert shown.state_label_sizes == env.state_label_sizes


def test_the_same_play_shows_the_same_and_another_seed_another() -> None:
    first, again = (gather(demonstrate(a_play(noise=0.5), 30)) for _ in range(2))
    assert first.batch.steps.equals(again.batch.steps) and first.batch.images == again.batch.images
    assert not first.batch.steps.equals(gather(demonstrate(a_play(noise=0.5, seed=4), 30)).batch.steps)


def test_noise_and_habit_show_in_their_share() -> None:
    actions = gather(demonstrate(a_play(noise=0.6, habit="="), 600)).batch.column("action").tolist()
    # 60% of steps by habit, and the last step of the few formulas that got that far.
    assert 330 < actions.count("=") < 450


def test_a_folder_of_shards_reads_back_as_what_was_shown(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demos"
    folder.parent.mkdir()
    mean = write_demonstrations(a_play(noise=0.3), 50, folder, shard_steps=20)
    assert sorted(path.name for path in folder.glob("batch_*")) == [f"batch_00000{i}.parquet" for i in range(3)]
    assert [len(TrajectoryLog(folder).read(index)) for index in range(3)] == [20, 20, 10]
    read, shown = load_demonstrations(folder, EZPOINTS), gather(demonstrate(a_play(noise=0.3), 50))
    assert read.batch.steps.equals(shown.batch.steps) and read.batch.images == shown.batch.images
    assert np.array_equal(read.state_labels, shown.state_labels)
    assert read.state_label_sizes == shown.state_label_sizes == (13, 13)
    assert mean == pytest.approx(shown.batch.column("reward").mean())


def test_an_environment_without_state_labels_is_shown_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import envs.cards.points

    monkeypatch.setattr(envs.cards.points.EZPoints, "state_label_sizes", ())
    write_demonstrations(a_play(), 5, tmp_path / "demos")
    read = load_demonstrations(tmp_path / "demos", EZPOINTS)
    assert read.state_labels.shape == (5, 0) and read.state_label_sizes == ()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(CosoError, match="exists"):
        write_demonstrations(a_play(), 5, tmp_path)
    assert (tmp_path / "mine").read_text() == "kept"


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demonstrations.pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_demonstrations(a_play(), 5, tmp_path / "demos")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"environment": "coso/EZPoint-v0"}, "did you mean coso/EZPoints-v0"),
        ({"kwargs": {"target": 3}}, "cannot be made with"),
        ({"habit": "-"}, "habit '-' is not an action of coso/EZPoints-v0: 1, 2"),
        ({"environment": "CartPole-v1"}, "CartPole-v1 has no expert"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_message(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CosoError, match=words):
        write_demonstrations(a_play(**changes), 5, tmp_path / "demos")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_whole_demonstration_is_refused_in_words(tmp_path: Path) -> None:
    folder = tmp_path / "demos"
    write_demonstrations(a_play(), 10, folder, shard_steps=5)
    with pytest.raises(CosoError, match="shows coso/EZPoints-v0, but environment.id is coso/Points24-v0"):
        load_demonstrations(folder, "coso/Points24-v0")
    with pytest.raises(CosoError, match="not a folder of demonstrations.*make one with `coso demos`"):
        load_demonstrations(tmp_path, EZPOINTS)

    def spoilt(name: str) -> Path:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        return copy

    missing = spoilt("missing")
    (missing / "batch_000001.parquet").unlink()
    with pytest.raises(CosoError, match="should hold 10 steps but holds 5"):
        load_demonstrations(missing, EZPOINTS)
    cut = spoilt("cut")
    (cut / "batch_000001.parquet").write_bytes((cut / "batch_000001.parquet").read_bytes()[:100])
    with pytest.raises(CosoError, match="cannot be read"):
        load_demonstrations(cut, EZPOINTS)
    foreign = spoilt("foreign")
    (foreign / ABOUT).write_text(json.dumps(["no", "mapping"]))
    with pytest.raises(CosoError, match="cannot be read"):
        load_demonstrations(foreign, EZPOINTS)
    older = spoilt("older")
    path = older / "batch_000000.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({"coso.schema_version": "0"}), path)
    with pytest.raises(CosoError, match="trajectory schema 0"):
        load_demonstrations(older, EZPOINTS)
