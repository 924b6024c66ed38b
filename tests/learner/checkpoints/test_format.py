"""The checkpoint format in one process: files that are whole or absent, signatures that tell models apart."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from safetensors.torch import load_file

from learner.checkpoints import format as checkpoint
from learner.checkpoints.format import (
    CheckpointMismatch,
    Record,
    Signature,
    aside_of,
    check_signature,
    parameter_digest,
    put_in_place,
    read_record,
    save_tensors,
    save_weights,
    write_record,
)

SIGNATURE = Signature(architecture="A", parameters="f" * 32, dtype="float32", world_size=2, zero_stage=1)


def test_a_record_reads_back(tmp_path):
    record = Record(SIGNATURE, update=12, version=13, algorithm={"entropy_coefficient": 0.5})
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


@pytest.mark.parametrize("content", ["", "{", "[]", '{"update": 1}', '"text"'])
def test_a_record_that_is_damaged_is_one_clear_error(tmp_path, content):
    (tmp_path / "learner.json").write_text(content)
    with pytest.raises(CheckpointMismatch, match="no learner checkpoint"):
        read_record(tmp_path)


def test_every_difference_is_named_with_both_sides(tmp_path):
    other = Signature(architecture="B", parameters="f" * 32, dtype="float32", world_size=4, zero_stage=1)
    with pytest.raises(CheckpointMismatch) as caught:
        check_signature(tmp_path, SIGNATURE, other)
    message = str(caught.value)
    assert "architecture A (checkpoint) against B" in message
    assert "world size 2 (checkpoint) against 4" in message
    assert "zero stage" not in message and "dtype" not in message
    check_signature(tmp_path, SIGNATURE, SIGNATURE)


def test_a_new_checkpoint_takes_the_place_of_the_former(tmp_path):
    folder = tmp_path / "step_5"
    for content in ("first", "second"):
        aside = aside_of(folder)
        aside.mkdir()
        (aside / "file").write_text(content)
        put_in_place(aside, folder)
        assert (folder / "file").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["step_5"]


def test_the_digest_tells_models_apart():
    def model(width: int = 4, frozen: bool = False) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 2)).requires_grad_(not frozen)

    digest = parameter_digest(model())
    assert digest == parameter_digest(model())
    assert digest != parameter_digest(model(width=5))
    trained = model()
    trained[0].weight.data += 1.0  # trained values are in the checkpoint, so they may differ
    assert digest == parameter_digest(trained)
    frozen = model(frozen=True)
    assert parameter_digest(frozen) != digest
    other_base = model(frozen=True)
    other_base[1].bias.data += 1.0
    assert parameter_digest(other_base) != parameter_digest(frozen)


def test_weights_beyond_one_file_are_written_with_an_index(tmp_path, monkeypatch):
    weights = {f"layer.{number}": torch.randn(8, 8) for number in range(5)}
    save_weights(tmp_path, weights.items())
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 2 * 8 * 8 * 4)
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_weights(folder, weights.items())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 8 * 8 * 4
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        assert load_file(folder / file)[name].equal(weights[name])


def test_weights_are_exhausted_though_the_disk_is_full(tmp_path, monkeypatch):
    """Other ranks take part in gathering every one, whatever becomes of the writer."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1)
    taken = []

    def weights():
        for number in range(4):
            taken.append(number)
            yield f"layer.{number}", torch.randn(1000)

    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, former[1]))  # no file may become larger, as on a full disk
    try:
        with pytest.raises(OSError, match="model-00001"):
            save_weights(tmp_path, weights())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert taken == [0, 1, 2, 3]
    save_weights(None, weights())
    assert len(taken) == 8


def test_tensors_that_cannot_be_written_are_an_os_error(tmp_path):
    with pytest.raises(OSError, match="could not be written|No such file"):
        save_tensors(tmp_path / "nowhere" / "file.safetensors", {"a": torch.zeros(1)})
