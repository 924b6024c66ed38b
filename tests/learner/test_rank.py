"""Whole updates under DeepSpeed: one learner, however many ranks, stages and micro-batches it is divided into."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from actors.chat import ChatProcessor
from actors.settings import ModelSettings
from learner.algorithms.ppo import PpoSettings
from learner.publish import remove_weight_files
from learner.settings import EntropySettings, LearnerSettings, LoraSettings, WarmStartSettings
from learner.setup import LearnerSetup, PublishTarget
from tests.learner.sample_trajectories import sample_trajectories
from tests.tiny_models import make_idefics3

STEPS = 18


@ray.remote(num_cpus=1)
class Host:
    """A process in which learner rank after learner rank is made, so that the imports are paid for once."""

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        self.place = rank, world_size, port

    def make(self, setup: LearnerSetup) -> None:
        from learner.rank import LearnerRank

        rank, world_size, port = self.place
        self.learner = LearnerRank(setup, rank, world_size)
        self.learner.start("127.0.0.1", port)

    def call(self, method: str, *arguments):
        return getattr(self.learner, method)(*arguments)

    def waits(self, method: str, *arguments) -> dict[str, int]:
        """How often a method asks for a number that a GPU would have to have computed by then, outside the model's own
        body: by name of PyTorch's operator."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        found: dict[str, int] = {}
        inside = []

        class Counted(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = function.overloadpacket.__name__
                by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
                if not inside and (by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")):
                    found[name] = found.get(name, 0) + 1
                return function(*args, **kwargs or {})

        body = self.learner.model.hf_model.base_model
        hooks = [
            body.register_forward_pre_hook(lambda *_: inside.append(1)),
            body.register_forward_hook(lambda *_: inside.clear()),
        ]
        with Counted():
            self.call(method, *arguments)
        for hook in hooks:
            hook.remove()
        return found

    def pictures_run(self, method: str, *arguments) -> tuple[dict, int]:
        """What a method answers, and how many pictures the vision tower's first layer was given."""
        tower, runs = self.learner.model.hf_model.base_model.get_encoder(modality="image"), []
        layer = tower.embeddings.patch_embedding
        hook = layer.register_forward_hook(lambda _module, inputs, _output: runs.append(len(inputs[0])))
        answer = self.call(method, *arguments)
        hook.remove()
        return answer, sum(runs)

    def offloaded(self) -> int:
        """Bytes of the optimizer's state whose memory is freed."""
        away = self.learner.optimizer_state._away
        assert all(storage.nbytes() == 0 for storage, _ in away)
        return sum(len(held) for _, held in away)

    def weights(self) -> dict[str, np.ndarray]:
        whole = {}
        for name, parameter in self.learner.model.value_head.named_parameters():
            whole[f"value_head.{name}"] = parameter.detach().numpy().copy()
        for name, parameter in self.learner.model.named_parameters():
            with self.learner.engine.gather([parameter]):
                whole[name] = parameter.detach().float().numpy().copy()
        return whole


class World:
    """The same learner on all hosts of one size."""

    def __init__(self, size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.hosts = [Host.remote(rank, size, port) for rank in range(size)]

    def __getattr__(self, method: str):
        def call(*arguments):
            if method in ("make", "offloaded", "pictures_run", "waits", "weights"):
                references = [getattr(host, method).remote(*arguments) for host in self.hosts]
            else:
                references = [host.call.remote(method, *arguments) for host in self.hosts]
            answers = ray.get(references, timeout=120)
            if method in ("update", "token_logprobs"):  # every rank says the same
                for other in answers[1:]:
                    np.testing.assert_equal(other, answers[0])
            return answers[0]

        return call


@pytest.fixture(scope="module")
def worlds(ray_cluster):
    made = {1: World(1), 2: World(2)}
    yield made
    for world in made.values():
        for host in world.hosts:
            ray.kill(host)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_idefics3(folder)
    return folder


@pytest.fixture(scope="module")
def setup(model_folder) -> LearnerSetup:
    return LearnerSetup(
        model=ModelSettings(path=str(model_folder), value_hidden=(16,)),
        algorithm=PpoSettings(epochs=2),
        entropy=EntropySettings(coefficient=0.05),
        # AdamW divides a gradient by its own size: with the usual epsilon, rounding in a tiny one is a whole step.
        learner=LearnerSettings(
            minibatch=8,
            micro_batch=3,
            token_chunk=50,
            gradient_clip=0.5,
            epsilon=1e-5,
            learning_rate=1e-3,
            final_learning_rate=1e-4,
        ),
        temperature=1.0,
        max_policy_lag=None,
        total_updates=3,
        seed=1,
    )


def with_learner(setup: LearnerSetup, **changes: object) -> LearnerSetup:
    return replace(setup, learner=setup.learner.model_copy(update=changes))


@pytest.fixture(scope="module")
def trajectories(model_folder):
    return sample_trajectories(ChatProcessor(str(model_folder)), STEPS)


@pytest.fixture(scope="module")
def reference(worlds, setup, trajectories):
    """One rank, stage 0: metrics and weights after two updates."""
    worlds[1].make(setup)
    metrics = [worlds[1].update(trajectories, 0), worlds[1].update(trajectories, 1)]
    return metrics, worlds[1].weights()


def assert_like(reference, metrics, weights) -> None:
    for name, expected in reference[1].items():
        np.testing.assert_allclose(weights[name], expected, atol=1e-5, err_msg=name)
    for got, expected in zip(metrics, reference[0], strict=True):
        compared = {name for name in expected if "part_norm" in name or name == "entropy_gradient_share"}
        assert got.keys() in (expected.keys(), expected.keys() - compared)  # stage 3 has no whole gradient to compare
        for name in got:
            value = expected[name]
            assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_an_update_moves_the_policy_and_reports_on_it(reference):
    first, second = reference[0]
    assert first["mismatch_tokens"] > 0
    assert first["optimizer_steps"] == 2 * 2  # epochs × minibatches of 9 and 9
    assert first["learning_rate"] == pytest.approx(1e-3)
    assert second["learning_rate"] == pytest.approx(5.5e-4)
    # The second update starts from moved weights, whose log-probabilities of the same answers are others.
    assert second["drift_mean"] != pytest.approx(first["drift_mean"], rel=1e-3)
    assert second["value_loss"] < first["value_loss"]
    assert np.isfinite([first[name] for name in first]).all()


def test_a_rate_of_the_value_heads_own_stays_when_the_policys_has_ended(worlds, setup, trajectories):
    """A critic has to follow the policy to the end. It may read the whole prompt (attention)."""
    with_attention = replace(setup, model=setup.model.model_copy(update={"value_attention": 8}))
    worlds[1].make(with_learner(with_attention, final_learning_rate=0.0, value_learning_rate=3e-3))
    before = worlds[1].weights()
    worlds[1].update(trajectories, setup.total_updates - 1)
    moved = {name for name, value in worlds[1].weights().items() if not np.array_equal(value, before[name])}
    assert moved and all(name.startswith("value_head.") for name in moved)
    assert "value_head.query.weight" in moved


@pytest.mark.parametrize("micro_batch", [1, 8])
def test_accumulation_does_not_change_the_update(worlds, setup, trajectories, reference, micro_batch):
    worlds[1].make(with_learner(setup, micro_batch=micro_batch))
    metrics = [worlds[1].update(trajectories, 0), worlds[1].update(trajectories, 1)]
    assert_like(reference, metrics, worlds[1].weights())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_of_any_stage_equal_one(worlds, setup, trajectories, reference, stage):
    """Minibatches of 9 in micro-batches of 3: the ranks' shares are unequal, so one needs a filler."""
    worlds[2].make(with_learner(setup, zero_stage=stage))
    metrics = [worlds[2].update(trajectories, 0), worlds[2].update(trajectories, 1)]
    assert_like(reference, metrics, worlds[2].weights())


def test_log_probabilities_are_those_of_the_model_itself(worlds, setup, trajectories, model_folder):
    """Against Hugging Face's own logits, one unpadded step at a time, special tokens banned."""
    import torch
    from transformers import AutoModelForImageTextToText

    from actors.images import decode_png

    worlds[2].make(replace(setup, temperature=0.7))
    found = worlds[2].token_logprobs(trajectories)
    chat = ChatProcessor(str(model_folder))
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    for row, ours in zip(trajectories.steps.to_pylist(), found, strict=True):
        inputs = chat.encode_prompt(row["prompt"], decode_png(trajectories.images[row["image"]]))
        response = torch.tensor([row["response_ids"]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], response], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, -response.shape[1] - 1 : -1] / 0.7
        logits[:, chat.banned_token_ids] = -torch.inf
        expected = logits.log_softmax(-1).gather(-1, response[0, :, None])[:, 0].numpy()
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_mismatch_is_zero_where_the_learner_made_the_tokens(worlds, setup, trajectories):
    """Behaviour log-probabilities from this very learner: no mismatch; made by another version: none counted."""
    import pyarrow as pa

    from actors.trajectory import STEP_SCHEMA, TrajectoryBatch

    worlds[2].make(setup)
    current = [array.tolist() for array in worlds[2].token_logprobs(trajectories)]
    position = trajectories.steps.schema.get_field_index("behaviour_logprobs")
    field = STEP_SCHEMA.field("behaviour_logprobs")
    steps = trajectories.steps.set_column(position, field, pa.array(current, field.type))
    metrics = worlds[2].update(TrajectoryBatch(steps, trajectories.images), 0)
    assert metrics["mismatch_max"] < 1e-5
    assert metrics["mismatch_kl"] < 1e-9
    moved = worlds[2].update(TrajectoryBatch(steps, trajectories.images), 1)
    assert moved["mismatch_max"] > 1e-3
    assert moved["mismatch_kl"] > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_lora_trains_adapters_alone_alike_on_one_rank_and_two(worlds, setup, trajectories, stage):
    lora = with_learner(setup, lora=LoraSettings(rank=4, alpha=8.0, dropout=0.0))
    worlds[1].make(lora)
    before = worlds[1].weights()
    worlds[1].update(trajectories, 0)
    expected = worlds[1].weights()
    worlds[2].make(with_learner(lora, zero_stage=stage))
    worlds[2].update(trajectories, 0)
    weights = worlds[2].weights()
    for name, start in before.items():
        np.testing.assert_allclose(weights[name], expected[name], atol=1e-5, err_msg=name)
        trained = ".lora_" in name or name.startswith("value_head")
        assert trained != np.array_equal(start, expected[name]), name


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 2), (2, 3)])
def test_small_steps_of_bfloat16_adapters_add_up_and_what_is_published_is_what_the_forward_pass_has(
    worlds, setup, trajectories, tmp_path, ranks, stage
):
    lora = LoraSettings(rank=4, alpha=8.0, dropout=0.0)
    rate = 2e-5  # a fifth of the least change that bfloat16 shows of a number above 1/32
    rough = with_learner(setup, lora=lora, zero_stage=stage, learning_rate=rate, schedule="constant", epsilon=1e-12)
    target = PublishTarget(transport="shared_memory", run=f"test-{tmp_path.name}", fallback_folder=tmp_path)
    worlds[ranks].make(replace(rough, model=setup.model.model_copy(update={"dtype": "bfloat16"}), publishing=target))
    before = worlds[ranks].weights()
    for update in range(3):
        worlds[ranks].update(trajectories, update)
    after = worlds[ranks].weights()
    first = {name: values for name, values in before.items() if ".lora_A." in name}
    assert any((after[name] != values)[np.abs(values) > 1 / 32].any() for name, values in first.items())
    published = load_file(worlds[ranks].publish(3).path)
    remove_weight_files(target.run, tmp_path)
    forward = {
        name.removeprefix("vlm.base_model.model.").replace(".default.", "."): values
        for name, values in after.items()
        if ".lora_" in name
    }
    assert published.keys() == forward.keys()
    for name, tensor in published.items():
        assert tensor.dtype == torch.bfloat16
        np.testing.assert_array_equal(tensor.float().numpy(), forward[name], err_msg=name)


@pytest.mark.parametrize("stage", [0, 3])
def test_bfloat16_updates(worlds, setup, trajectories, reference, stage):
    rough = with_learner(setup, zero_stage=stage)
    worlds[2].make(replace(rough, model=setup.model.model_copy(update={"dtype": "bfloat16"})))
    worlds[2].update(trajectories, 0)
    second = worlds[2].update(trajectories, 1)
    assert second["value_loss"] == pytest.approx(reference[0][1]["value_loss"], rel=0.1)


@pytest.mark.parametrize(("stage", "dtype", "bytes_each"), [(0, "float32", 8), (3, "bfloat16", 12)])
def test_the_optimizers_state_is_in_host_memory_between_updates_and_nothing_else_changes(
    worlds, setup, trajectories, tmp_path, stage, dtype, bytes_each
):
    plain = replace(with_learner(setup, zero_stage=stage), model=setup.model.model_copy(update={"dtype": dtype}))
    worlds[1].make(plain)
    expected = [worlds[1].update(trajectories, 0), worlds[1].update(trajectories, 1)]
    weights = worlds[1].weights()

    worlds[1].make(with_learner(plain, offload_optimizer=True))
    assert worlds[1].update(trajectories, 0) == expected[0]
    trained = sum(value.size for name, value in weights.items() if not name.startswith("value_head."))
    assert worlds[1].offloaded() >= bytes_each * trained
    worlds[1].token_logprobs(trajectories)
    worlds[1].save_checkpoint(tmp_path / "checkpoint")
    worlds[1].update(trajectories, 1)
    worlds[1].load_checkpoint(tmp_path / "checkpoint")
    assert worlds[1].offloaded() >= bytes_each * trained
    assert worlds[1].update(trajectories, 1) == expected[1]
    for name, value in worlds[1].weights().items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)


def test_supervised_steps_learn_the_demonstrations_alike_on_one_rank_and_two(worlds, setup, trajectories):
    course = WarmStartSettings(steps=12, batch=6, learning_rate=1e-2, informative_weight=3.0)
    losses = {}
    for size, stage in ((1, 0), (2, 3)):
        worlds[size].make(with_learner(setup, zero_stage=stage))
        worlds[size].begin_supervised(trajectories, course)
        reports = [*worlds[size].supervised_steps(5), *worlds[size].supervised_steps(100)]
        assert len(reports) == course.steps
        losses[size] = [report["nll"] for report in reports]
    assert losses[1][-1] < 0.7 * losses[1][0]
    np.testing.assert_allclose(losses[2], losses[1], rtol=2e-3)


def test_a_rank_answers_who_it_is(worlds, setup):
    worlds[1].make(setup)
    answer = worlds[1].ping()
    assert answer["pid"] != os.getpid() and answer["rss"] > 1e8 and answer["update"] == 0


def test_batches_cut_by_tokens_that_a_thread_makes_beside_the_passes_are_the_same(
    worlds, setup, trajectories, reference
) -> None:
    """And images are processed two at once."""
    worlds[1].make(with_learner(setup, threads=2, micro_batch=8, micro_tokens=150))
    metrics = [worlds[1].update(trajectories, 0), worlds[1].update(trajectories, 1)]
    assert_like(reference, metrics, worlds[1].weights())


def test_no_micro_batch_waits_for_the_device(worlds, setup, trajectories) -> None:
    counts = []
    for micro_batch in (1, 9):
        worlds[1].make(with_learner(setup, micro_batch=micro_batch))
        counts.append(worlds[1].waits("update", trajectories, 0))
    # nonzero is asked of a batch before it is moved to the device
    assert counts[0].pop("nonzero") > counts[1].pop("nonzero")
    assert counts[0] == counts[1] and counts[0]


def test_an_update_of_adapters_runs_the_frozen_tower_once_per_picture(worlds, setup, trajectories) -> None:
    found = {}
    for kept in (0, 1 << 28):
        worlds[1].make(with_learner(setup, lora=LoraSettings(rank=4, alpha=8.0), feature_cache_bytes=kept))
        found[kept], pictures = worlds[1].pictures_run("update", trajectories, 0)
        assert (pictures == len(trajectories.images)) == (kept > 0)
    for name, expected in found[0].items():
        assert found[1 << 28][name] == pytest.approx(expected, rel=1e-3, abs=1e-4), name
