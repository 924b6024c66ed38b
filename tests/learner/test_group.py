"""The driver's side: checkpoints that resume exactly, failures that name their rank, restarts that lose nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from actors.chat import ChatProcessor
from actors.images import PngEncoder
from actors.settings import ModelSettings
from actors.trajectory import TrajectoryBatch
from cluster.config.files import validate
from cluster.launch.model_shape import read_shape
from cluster.launch.sizing import checkpoint_bytes, trained_parameters
from learner.algorithms.ppo import PpoSettings
from learner.checkpoints.format import CheckpointMismatch, CheckpointWriteFailed
from learner.group import LearnerFailed, LearnerGroup, RankResources
from learner.settings import EntropySettings, LearnerSettings, LoraSettings, WarmStartSettings
from learner.setup import LearnerSetup, PublishTarget
from tests.learner.sample_trajectories import sample_trajectories
from tests.tiny_models import make_idefics3, picture

RESOURCES = RankResources(cpus=1.0, gpus=0.0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_idefics3(folder)
    return folder


@pytest.fixture(scope="module")
def setup(model_folder, tmp_path_factory) -> LearnerSetup:
    """LoRA with dropout, so that a resume also has to draw the same random numbers."""
    return LearnerSetup(
        model=ModelSettings(path=str(model_folder), value_hidden=(16,)),
        algorithm=PpoSettings(epochs=2),
        entropy=EntropySettings(coefficient=0.05),
        learner=LearnerSettings(
            ranks=2,
            lora=LoraSettings(rank=4, alpha=8.0, dropout=0.2, serving="merged"),
            minibatch=8,
            micro_batch=3,
            gradient_clip=0.5,
            zero_stage=2,
            learning_rate=1e-3,
            final_learning_rate=1e-4,
            start_deadline_s=180.0,
            update_deadline_s=120.0,
            collective_deadline_s=60.0,
        ),
        temperature=1.0,
        max_policy_lag=None,
        total_updates=4,
        seed=1,
        publishing=PublishTarget(
            transport="object_store", run="test-group", fallback_folder=tmp_path_factory.mktemp("weights")
        ),
    )


@pytest.fixture(scope="module")
def trajectories(model_folder):
    return sample_trajectories(ChatProcessor(str(model_folder)), 18)


@pytest.fixture(scope="module")
def group(ray_cluster, setup):
    made = LearnerGroup(setup, RESOURCES)
    yield made
    made.close()


@pytest.fixture(scope="module")
def checkpoint(group, trajectories, tmp_path_factory) -> Path:
    """Of update 1, with version 1 published."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step_1"
    group.update(trajectories, 0)
    group.publish(1)
    group.save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(group, checkpoint, trajectories):
    """Metrics of update 1 right after the checkpoint, and the log-probabilities after it."""
    return group.update(trajectories, 1), group.token_logprobs(trajectories)


def assert_same_course(group: LearnerGroup, trajectories, uninterrupted) -> None:
    np.testing.assert_equal(group.update(trajectories, 1), uninterrupted[0])
    for got, expected in zip(group.token_logprobs(trajectories), uninterrupted[1], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_loading_a_checkpoint_resumes_exactly(group, checkpoint, trajectories, uninterrupted):
    assert group.load_checkpoint(checkpoint) == {"update": 1, "version": 1}
    assert_same_course(group, trajectories, uninterrupted)


def test_a_checkpoint_holds_a_model_that_anyone_can_load(group, checkpoint, trajectories, setup):
    """model/ is complete, with adapters merged; the adapters alone, put on the base model by peft, say the same."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from actors.images import decode_png

    group.load_checkpoint(checkpoint)
    found = group.token_logprobs(trajectories)[0]
    chat = ChatProcessor(str(checkpoint / "model"))
    row = trajectories.steps.slice(0, 1).to_pylist()[0]
    inputs = chat.encode_prompt(row["prompt"], decode_png(trajectories.images[row["image"]]))
    response = torch.tensor([row["response_ids"]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], response], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    base = AutoModelForImageTextToText.from_pretrained(setup.model.path)
    models = {
        "model": AutoModelForImageTextToText.from_pretrained(checkpoint / "model").eval(),
        "adapter": PeftModel.from_pretrained(base, checkpoint / "adapter").eval(),
    }
    for name, model in models.items():
        with torch.no_grad():
            logits = model(**inputs).logits[0, -response.shape[1] - 1 : -1]
        logits[:, chat.banned_token_ids] = -torch.inf
        expected = logits.log_softmax(-1).gather(-1, response[0, :, None])[:, 0].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)


def test_a_checkpoint_takes_the_disk_that_coso_plan_says(checkpoint, setup):
    config, shape = validate({"learner": setup.learner.model_dump()}), read_shape(Path(setup.model.path))
    files = [*checkpoint.glob("*/*.safetensors"), *checkpoint.rglob("*_optim_states.pt")]
    # Files have headers; that of DeepSpeed's file of trained weights is larger than those of so small a model.
    expected = checkpoint_bytes(config, shape) - 4 * trained_parameters(config, shape)
    assert expected <= sum(file.stat().st_size for file in files) < 1.1 * expected


def test_published_weights_are_those_of_the_checkpoint(group, checkpoint):
    from safetensors.torch import load, load_file

    group.load_checkpoint(checkpoint)
    update = group.publish(7)
    assert update.version == 7 and [answer["version"] for answer in group.ping()] == [7, 7]
    published = {name: tensor for part in ray.get(list(update.refs)) for name, tensor in load(part.tobytes()).items()}
    saved = load_file(checkpoint / "model" / "model.safetensors")
    assert published.keys() == saved.keys()
    for name, tensor in saved.items():
        assert published[name].equal(tensor), name


def test_a_killed_rank_is_named_and_a_restart_goes_on_as_if_nothing_had_happened(
    group, checkpoint, trajectories, uninterrupted
):
    group.load_checkpoint(checkpoint)
    pids = [answer["pid"] for answer in group.ping()]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(100):
                group.update(trajectories, 1)
        except LearnerFailed as error:
            failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(1.0)  # in the midst of some update
    os.kill(pids[1], signal.SIGKILL)
    worker.join(timeout=60)
    assert not worker.is_alive()
    assert "update: learner rank 1 died" in str(failures[0])

    group.close()
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids))
    with pytest.raises(LearnerFailed, match="restart it first"):
        group.publish(1)
    assert group.restart(checkpoint) == {"update": 1, "version": 1}
    assert_same_course(group, trajectories, uninterrupted)


def test_a_rank_that_hangs_is_named_within_the_deadline(group, checkpoint, trajectories):
    pid = group.ping()[1]["pid"]
    patient = group.setup
    group.setup = replace(patient, learner=patient.learner.model_copy(update={"update_deadline_s": 3.0}))
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(LearnerFailed, match=r"update: learner rank .*1 did not finish within 3 s"):
            group.update(trajectories, 1)
    finally:
        group.setup = patient
        os.kill(pid, signal.SIGCONT)


def test_a_call_longer_than_the_deadline_is_waited_for_while_the_ranks_come_further(group, checkpoint, trajectories):
    patient = group.setup
    group.begin_supervised(trajectories, WarmStartSettings(steps=1000, batch=8))
    group.supervised_steps(1)
    begun = time.monotonic()
    group.supervised_steps(4)
    seconds_per_step = (time.monotonic() - begun) / 4
    deadline_s = 2.0
    group.setup = replace(patient, learner=patient.learner.model_copy(update={"update_deadline_s": deadline_s}))
    try:
        begun, steps = time.monotonic(), int(2 * deadline_s / seconds_per_step) + 1
        assert len(group.supervised_steps(steps)) == steps
        assert time.monotonic() - begun > deadline_s
    finally:
        group.setup = patient
        group.load_checkpoint(checkpoint)


def test_a_full_disk_leaves_the_former_checkpoint_whole(group, checkpoint, trajectories, uninterrupted):
    """One rank may write files of 20 kB at most, as on a disk with no more room than that."""
    before = {path: path.stat().st_mtime_ns for path in sorted(checkpoint.rglob("*"))}
    pid = group.ping()[1]["pid"]
    former = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, former[1]))
    try:
        with pytest.raises(CheckpointWriteFailed, match="step_1 could not be written.*rank 1.*Make room"):
            group.save_checkpoint(checkpoint)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, former)
    assert {path: path.stat().st_mtime_ns for path in sorted(checkpoint.rglob("*"))} == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step_1"]
    assert group.load_checkpoint(checkpoint)["update"] == 1
    assert_same_course(group, trajectories, uninterrupted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"world_size": 4}, "world size 4 .checkpoint. against 2"),
        ({"zero_stage": 3}, "zero stage 3 .checkpoint. against 2"),
        ({"parameters": "0" * 32}, "parameters 0+ .checkpoint. against"),
        ({"architecture": "OtherModel"}, "architecture OtherModel .checkpoint. against Idefics3"),
    ],
)
def test_a_checkpoint_of_another_learner_is_refused(group, checkpoint, tmp_path, change, words):
    record = json.loads((checkpoint / "learner.json").read_text())
    record["signature"] |= change
    (tmp_path / "learner.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointMismatch, match=words):
        group.load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_schema_or_none_is_refused(group, checkpoint, tmp_path):
    record = json.loads((checkpoint / "learner.json").read_text())
    (tmp_path / "learner.json").write_text(json.dumps(record | {"schema_version": 99}))
    with pytest.raises(CheckpointMismatch, match="schema 99; this program reads 2"):
        group.load_checkpoint(tmp_path)
    with pytest.raises(CheckpointMismatch, match="no learner checkpoint"):
        group.load_checkpoint(tmp_path / "nothing")


def test_a_path_without_a_model_is_one_clear_error(ray_cluster, setup, tmp_path):
    from actors.chat import NotAVisionLanguageModel

    with pytest.raises(NotAVisionLanguageModel, match="cannot be loaded"):
        LearnerGroup(
            replace(
                setup,
                model=setup.model.model_copy(update={"path": str(tmp_path)}),
                learner=setup.learner.model_copy(update={"ranks": 1}),
            ),
            RESOURCES,
        )


def test_ranks_that_cannot_be_placed_are_named(ray_cluster, setup):
    hungry = RankResources(cpus=1000.0, gpus=0.0)
    impatient = replace(setup, learner=setup.learner.model_copy(update={"start_deadline_s": 3.0}))
    with pytest.raises(LearnerFailed, match="starting: learner rank 0, 1 did not finish within 3 s"):
        LearnerGroup(impatient, hungry)


def test_each_rank_processes_its_images_once_ahead_of_the_update(group, checkpoint, model_folder):
    def processed() -> int:
        counts = [
            actor.__ray_call__.remote(lambda rank: rank.passes._builder._tensors.encoded) for actor in group._actors
        ]
        return sum(ray.get(counts, timeout=60))

    rows = sample_trajectories(ChatProcessor(str(model_folder)), 10).steps.to_pylist()
    encoded = [PngEncoder().encode(picture(100 + number)) for number in range(len(rows))]
    for row, image in zip(rows, encoded, strict=True):
        row |= {"image": image.key, "final_image": None, "final_prompt": None, "final_prompt_ids": None}
    shown = TrajectoryBatch.from_rows(rows, dict(encoded))
    group.load_checkpoint(checkpoint)
    before, deadline = processed(), time.monotonic() + 60
    group.prepare(shown, 1)
    while processed() < before + len(rows) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processed() == before + len(rows)
    group.update(shown, 1)
    assert processed() == before + len(rows) and group._prepared is None


def test_ranks_answer_pings_during_an_update(group, checkpoint, trajectories):
    group.load_checkpoint(checkpoint)
    worker = threading.Thread(target=lambda: [group.update(trajectories, 1) for _ in range(4)])
    worker.start()
    answers = 0
    while worker.is_alive():
        started = time.monotonic()
        group.ping(deadline_s=10.0)
        assert time.monotonic() - started < 5.0
        answers += 1
    worker.join()
    assert answers > 4
