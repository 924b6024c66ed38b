"""The record of a rollout comes back as it was written, and no crash or repeat loses any of it."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.images import PngEncoder, decode_png, image_hash
from actors.trajectory import (
    SCHEMA_VERSION,
    STEP_SCHEMA,
    SchemaMismatch,
    TrajectoryBatch,
    TrajectoryLog,
    UnreadableTrajectory,
)


def _picture(seed, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def _batch(*specs):
    """One row per (episode, response length, picture number)."""
    encoder, rows, images = PngEncoder(), [], {}
    for number, (episode, length, seed) in enumerate(specs):
        key, png = encoder.encode(_picture(seed))
        images[key] = png
        rows.append(
            {
                "episode": episode,
                "step": number,
                "image": key,
                "prompt": f"prompt {number}",
                "prompt_ids": [1, 2],
                "response_ids": list(range(length)),
                "behaviour_logprobs": [-0.5 * i for i in range(length)],
                "policy_versions": [{"version": number + 3, "start": 0}, {"version": number + 2, "start": 1}],
                "reward": float(number),
                "terminated": False,
            }
        )
    return TrajectoryBatch.from_rows(rows, images)


lengths = st.lists(st.integers(0, 5), max_size=6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=lengths, cut=st.integers(0, 6))
def test_list_columns_come_back_step_by_step_also_of_a_slice(lengths, cut):
    batch = _batch(*[("e", length, 0) for length in lengths])
    assert [ids.tolist() for ids in batch.ragged("response_ids", np.int64)] == [list(range(n)) for n in lengths]
    rest = TrajectoryBatch(batch.steps.slice(cut), batch.images)
    assert [len(ids) for ids in rest.ragged("response_ids", np.int64)] == lengths[cut:]
    assert rest.generated_tokens == sum(lengths[cut:])
    assert all(len(weights) == 0 for weights in batch.ragged("influence", np.float32))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=lengths, cut=st.integers(0, 6), seed=st.integers(0, 9))
def test_influence_is_written_beside_its_tokens_and_nothing_else_changes(lengths, cut, seed):
    whole = _batch(*[("e", length, 0) for length in lengths])
    batch = TrajectoryBatch(whole.steps.slice(cut), whole.images)
    generator = np.random.default_rng(seed)
    influence = [generator.random(length).astype(np.float32) for length in lengths[cut:]]
    scored = batch.with_influence(influence)
    assert scored.steps.schema.equals(STEP_SCHEMA, check_metadata=True)
    for found, expected in zip(scored.ragged("influence", np.float32), influence, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert scored.steps.drop_columns(["influence"]).equals(batch.steps.drop_columns(["influence"]))


def test_influence_of_the_wrong_length_is_refused():
    batch = _batch(("e", 3, 0), ("e", 2, 0))
    with pytest.raises(ValueError, match="one weight for every response token"):
        batch.with_influence([np.zeros(3, np.float32), np.zeros(3, np.float32)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(runs=st.lists(st.integers(1, 4), max_size=5))
def test_episodes_are_the_runs_of_equal_names(runs):
    names = [f"e{number}" for number, length in enumerate(runs) for _ in range(length)]
    slices = _batch(*[(name, 1, 0) for name in names]).episode_slices()
    assert [part.stop - part.start for part in slices] == runs
    assert [set(names[part]) for part in slices] == [{f"e{number}"} for number in range(len(runs))]


def test_a_steps_version_is_the_oldest_that_made_any_of_its_tokens():
    assert _batch(("e", 2, 0), ("e", 2, 0)).behaviour_versions().tolist() == [2, 3]


def test_joined_batches_hold_every_step_and_each_image_once():
    joined = TrajectoryBatch.concatenate([_batch(("a", 1, 0), ("a", 1, 1)), _batch(("b", 2, 1))])
    assert len(joined) == 3 and len(joined.images) == 2
    assert joined.generated_tokens == 4
    assert len(TrajectoryBatch.concatenate([])) == 0
    assert joined.nbytes == joined.steps.nbytes + sum(map(len, joined.images.values()))


def test_an_image_is_known_by_its_content_and_shape_and_comes_back_exactly():
    flat = np.zeros((2, 6, 3), np.uint8)
    assert image_hash(flat) == image_hash(flat.copy()) != image_hash(flat.reshape(6, 2, 3))
    picture = _picture(1, 16)
    assert image_hash(picture[:, ::2]) == image_hash(picture[:, ::2].copy())
    key, png = PngEncoder().encode(picture)
    np.testing.assert_array_equal(np.asarray(decode_png(png)), picture)
    assert key == image_hash(picture)


def test_the_png_encoder_gives_the_same_bytes_whether_it_remembers_or_not():
    one = len(PngEncoder().encode(_picture(0))[1])
    small, large = PngEncoder(capacity_bytes=2 * one), PngEncoder()
    for seed in [0, 1, 2, 0, 0, 3, 1]:
        assert small.encode(_picture(seed)) == large.encode(_picture(seed))


def test_a_logged_batch_is_read_back_whole(tmp_path):
    folder = tmp_path / "key=value" / "trajectories"  # must not become a column
    batch = _batch(("a", 3, 0), ("a", 0, 1), ("b", 2, 0)).with_influence(
        [np.ones(3, np.float32), np.empty(0, np.float32), np.zeros(2, np.float32)]
    )
    log = TrajectoryLog(folder)
    assert log.write(4, batch) == sum(path.stat().st_size for path in folder.iterdir())
    for reader in (log, TrajectoryLog(folder)):
        assert reader.updates() == [4]
        found = reader.read(4)
        assert found.steps.equals(batch.steps) and found.images == batch.images
    assert not list(folder.glob("*.tmp"))


def test_an_image_is_written_once_and_found_from_every_batch(tmp_path):
    log = TrajectoryLog(tmp_path)
    first, second = _batch(("a", 1, 0), ("a", 1, 1)), _batch(("b", 1, 1), ("b", 1, 2))
    log.write(1, first)
    TrajectoryLog(tmp_path).write(2, second)
    assert pq.read_table(tmp_path / "images_000002.parquet").num_rows == 1
    assert TrajectoryLog(tmp_path).read(2).images == second.images


def test_an_update_done_again_after_a_resume_loses_no_image_of_the_others(tmp_path):
    log = TrajectoryLog(tmp_path)
    log.write(1, _batch(("a", 1, 0)))
    log.write(2, _batch(("a", 1, 0), ("a", 1, 1)))
    resumed = TrajectoryLog(tmp_path)
    resumed.write(1, _batch(("c", 1, 5)))
    for reader in (resumed, TrajectoryLog(tmp_path)):
        assert reader.read(1).images == _batch(("c", 1, 5)).images
        assert reader.read(2).images == _batch(("a", 1, 0), ("a", 1, 1)).images


def test_a_file_of_another_schema_is_refused_by_its_versions(tmp_path):
    log = TrajectoryLog(tmp_path)
    log.write(1, _batch(("a", 1, 0)))
    other = pq.read_table(log.batch_path(1)).replace_schema_metadata({"coso.schema_version": "99"})
    pq.write_table(other, log.batch_path(1))
    with pytest.raises(SchemaMismatch, match=f"schema 99; this program reads {SCHEMA_VERSION}"):
        log.read(1)


def test_a_file_of_schema_1_is_read_without_knowing_where_actions_begin(tmp_path):
    log = TrajectoryLog(tmp_path)
    batch = _batch(("a", 1, 0), ("a", 2, 1))
    log.write(1, batch)
    old = pq.read_table(log.batch_path(1)).drop_columns("action_start")
    pq.write_table(old.replace_schema_metadata({"coso.schema_version": "1"}), log.batch_path(1))
    steps = log.read(1).steps
    assert steps.schema.equals(batch.steps.schema, check_metadata=True)
    assert steps["action_start"].null_count == len(batch) and steps.drop_columns("action_start").equals(
        batch.steps.drop_columns("action_start")
    )


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    log = TrajectoryLog(tmp_path)
    batch = _batch(("a", 1, 0))
    log.write(1, batch)

    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        log.write(1, _batch(("b", 1, 0)))
    monkeypatch.undo()
    assert TrajectoryLog(tmp_path).read(1).steps.equals(batch.steps)


def test_rows_are_held_to_the_schema():
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        TrajectoryBatch.from_rows([{"reward": "much"}], {})


@settings(max_examples=20, deadline=None, derandomize=True)
@given(lengths=lengths, cut=st.integers(0, 6))
def test_a_batch_travels_between_processes_as_one_buffer_with_what_it_holds_and_no_more(lengths, cut):
    whole = TrajectoryBatch.concatenate([_batch(*[("e", length, n) for n, length in enumerate(lengths)]), _batch()])
    part = TrajectoryBatch(whole.steps.slice(cut), whole.images)
    for batch in (whole, part, TrajectoryBatch.empty(), TrajectoryBatch(pa.concat_tables([whole.steps, part.steps]))):
        buffers = []
        pickled = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
        back = pickle.loads(pickled, buffers=buffers)
        assert len(buffers) == 1
        assert back.steps.equals(batch.steps, check_metadata=True) and back.images == batch.images
        for name in ("response_ids", "behaviour_logprobs"):
            for one, other in zip(back.ragged(name, np.float32), batch.ragged(name, np.float32), strict=True):
                np.testing.assert_array_equal(one, other)


def test_a_damaged_file_is_named(tmp_path):
    log = TrajectoryLog(tmp_path)
    log.write(1, _batch(("a", 3, 0), ("a", 2, 1)))
    path = log.batch_path(1)
    whole = path.read_bytes()
    for damage in (b"", b"PAR1", whole[:-10], whole[: len(whole) // 2], whole[:40] + b"\xff" * 60 + whole[100:]):
        path.write_bytes(damage)
        with pytest.raises(UnreadableTrajectory, match="batch_000001.parquet is damaged"):
            log.read(1)
    path.write_bytes(whole)
    steps = pq.read_table(path)
    for changed in (steps.drop_columns("reward"), steps.set_column(0, "run", pa.array([[1]] * 2))):
        pq.write_table(changed.replace_schema_metadata(steps.schema.metadata), path)
        with pytest.raises(SchemaMismatch, match="has other columns than trajectory schema"):
            log.read(1)
    pq.write_table(steps.set_column(1, "episode", pa.nulls(2, pa.string())), path)
    with pytest.raises(UnreadableTrajectory, match="steps without episode"):
        log.read(1)
    (tmp_path / "images_000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnreadableTrajectory, match="images_000001.parquet is damaged"):
        TrajectoryLog(tmp_path)


def test_other_files_of_the_folder_are_no_batches(tmp_path):
    log = TrajectoryLog(tmp_path)
    log.write(3, _batch(("a", 1, 0)))
    (tmp_path / "batch_copy.parquet").write_bytes(b"")
    assert log.updates() == [3]
