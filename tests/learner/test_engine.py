"""DeepSpeed behind its narrow class: every stage trains alike, alone or over two ranks, and resumes exactly."""

from __future__ import annotations

import gc
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from peft import LoraConfig, inject_adapter_in_model

from cluster.config.files import validate
from cluster.launch.sizing import BUCKET, learner_states
from learner.engine import DeepSpeedEngine, RankPlace, StepReport
from learner.settings import LearnerSettings
from tests.cluster.launch.test_sizing import SHAPE

RATES = {"module": 3e-3, "head": 1e-2}


@dataclass
class Opaque:
    """What the module says, as the learner's model does: a class that DeepSpeed does not look into."""

    logits: torch.Tensor
    values: torch.Tensor


class TwoHeads(torch.nn.Module):
    """A trunk and a policy head, and a value head outside, which a loss may leave out."""

    moved_whole = False

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.trunk = torch.nn.Linear(6, 16)
        self.policy = torch.nn.Linear(16, 4)
        value_head = torch.nn.Linear(16, 1)
        self.outside = (value_head,)  # no submodule
        for parameter in [*self.parameters(), *value_head.parameters()]:
            parameter.data.normal_(0.0, 0.3, generator=generator)

    def forward(self, x: torch.Tensor) -> Opaque:
        hidden = torch.tanh(self.trunk(x.to(self.trunk.weight.dtype)))
        return Opaque(self.policy(hidden).float(), self.outside[0](hidden.float())[:, 0])

    def to(self, *arguments: object, **named: object) -> TwoHeads:
        self.moved_whole = True
        return super().to(*arguments, **named)


@ray.remote(num_cpus=1)
class Rank:
    """One process of a world that stays up while engine after engine is made in it."""

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        self.place = RankPlace(rank, world_size, "127.0.0.1", port)
        connections = psutil.Process().net_connections(kind="tcp")
        self.ports_of_ray = {found.laddr for found in connections if found.status == psutil.CONN_LISTEN}

    def make(self, dtype: str = "float32", adapters: bool = False, **settings: object) -> None:
        learner = LearnerSettings.model_validate({"gradient_clip": 0.5, **settings})
        self.engine = DeepSpeedEngine(learner, dtype, self.place)
        module = TwoHeads()
        if adapters:
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["trunk"], init_lora_weights=False), module)
            generator = torch.Generator().manual_seed(8)
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_(0.0, 0.3, generator=generator)
        self.head = module.outside[0]
        self.engine.initialize(module, self.head)
        self.engine.set_learning_rates(**RATES)

    def train(
        self, steps: range, accumulation: int, with_value: bool = True, poison: float | None = None
    ) -> list[float]:
        """Mean loss over 8 samples per step, which are split over ranks and `accumulation` backward passes. poison: a
        number that rank 0 multiplies its last loss by."""
        losses = []
        for step in steps:
            x, targets, returns = samples(step)
            parts = torch.arange(8).reshape(accumulation, self.place.world_size, -1)[:, self.place.rank]
            total = 0.0
            parts = list(parts)
            for part in parts:
                output = self.engine.forward(x[part])
                logits, values = output.logits, output.values
                loss = torch.nn.functional.cross_entropy(logits, targets[part], reduction="sum")
                if with_value:
                    loss = loss + (values - returns[part]).square().sum()
                if poison is not None and self.place.rank == 0 and part is parts[-1]:
                    loss = loss * poison
                self.engine.backward(loss * self.place.world_size / 8)
                total += loss.item()
            self.last = self.engine.step()
            losses.append(self.engine.sum_over_ranks(np.array([total]))[0] / 8)
        return losses

    def held(self, dtype: str, stage: int) -> tuple[int, int]:
        """Weights of a module, and bytes of all tensors of its training when a step's gradients are complete."""
        before = storages()  # of engines before it, which live until the new ones are counted
        module = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(32)))
        self.engine = DeepSpeedEngine(LearnerSettings(zero_stage=stage), dtype, self.place)
        self.engine.initialize(module, torch.nn.Linear(1, 1))
        for step in range(2):  # the first makes the optimizer's states
            if step:
                self.engine.step()
            self.engine.backward(self.engine.forward(torch.ones(2, 64, dtype=getattr(torch, dtype))).float().sum())
        sizes = [storage.nbytes() for address, storage in storages().items() if address not in before]
        # Without the buffer that gradients pass through, whose size does not depend on the model.
        return 32 * 64 * 64, sum(size for size in sizes if size < BUCKET)

    def listening(self) -> list[str]:
        """Addresses of this process's ports, without those that Ray opened before there was an engine."""
        connections = psutil.Process().net_connections(kind="tcp")
        opened = {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}
        return [address.ip for address in opened - self.ports_of_ray]

    def report(self) -> StepReport:
        return self.last

    def moved_whole(self) -> bool:
        return self.engine.module.moved_whole

    def weights(self) -> dict[str, np.ndarray]:
        whole = {f"value_head.{name}": p.detach().numpy().copy() for name, p in self.head.named_parameters()}
        assert all(parameter.dtype == torch.float32 for parameter in self.head.parameters())
        for name, parameter in self.engine.module.named_parameters():
            with self.engine.gather([parameter]):
                whole[name] = parameter.detach().float().numpy().copy()
        return whole

    def save(self, folder: Path) -> None:
        self.engine.save(folder, "state")
        torch.save((self.head.state_dict(), self.engine.head_state()), folder / f"head{self.place.rank}.pt")

    def load(self, folder: Path) -> None:
        self.engine.load(folder, "state")
        head, state = torch.load(folder / f"head{self.place.rank}.pt", weights_only=True)
        self.head.load_state_dict(head)
        self.engine.load_head_state(state)


def storages() -> dict[int, torch.UntypedStorage]:
    """The memory of this process's tensors, by its address."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    return {storage.data_ptr(): storage for storage in (each.untyped_storage() for each in tensors)}


def samples(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step % 3)
    x = torch.randn(8, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long(), x[:, 2]


def world(size: int) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Rank.remote(rank, size, port) for rank in range(size)]


@pytest.fixture(scope="module")
def worlds(ray_cluster):
    made = {1: world(1), 2: world(2)}
    yield made
    for ranks in made.values():
        for rank in ranks:
            ray.kill(rank)


def on_all(ranks: list, method: str, *arguments, **named):
    return ray.get([getattr(rank, method).remote(*arguments, **named) for rank in ranks], timeout=120)


@pytest.fixture(scope="module")
def reference(worlds):
    """Plain PyTorch: two AdamWs, each with its clip, mean over the 8 samples, no DeepSpeed."""
    module = TwoHeads()
    head = module.outside[0]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(module.parameters()), "lr": RATES["module"]},
            {"params": list(head.parameters()), "lr": RATES["head"]},
        ],
        weight_decay=0.0,
    )
    losses = []
    for step in range(12):
        x, targets, returns = samples(step)
        output = module(x)
        logits, values = output.logits, output.values
        loss = torch.nn.functional.cross_entropy(logits, targets) + (values - returns).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        head_norm = torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    weights = dict(module.named_parameters()) | {f"value_head.{name}": p for name, p in head.named_parameters()}
    return losses, {name: p.detach().numpy() for name, p in weights.items()}, (float(norm), float(head_norm))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_equals_plain_adamw(worlds, reference, stage, ranks):
    for accumulation in (1, 4):
        on_all(worlds[ranks], "make", zero_stage=stage)
        losses = on_all(worlds[ranks], "train", range(12), accumulation)[0]
        report = on_all(worlds[ranks], "report")[0]
        assert losses[-1] < losses[0]
        np.testing.assert_allclose(losses, reference[0], atol=1e-5)
        assert (report.gradient_norm, report.head_gradient_norm) == pytest.approx(reference[2], rel=1e-4)
        assert report.applied
        for weights in on_all(worlds[ranks], "weights"):
            for name, expected in reference[1].items():
                np.testing.assert_allclose(weights[name], expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_trains(worlds, reference, stage):
    on_all(worlds[2], "make", zero_stage=stage, dtype="bfloat16")
    losses = on_all(worlds[2], "train", range(12), 2)[0]
    np.testing.assert_allclose(losses, reference[0], rtol=0.05)


def test_under_stage_3_no_device_has_the_whole_module_at_any_time(worlds):
    for stage, moved in ((2, True), (3, False)):
        on_all(worlds[2], "make", zero_stage=stage)
        assert on_all(worlds[2], "moved_whole") == [moved, moved]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 2), (2, 3)])
def test_a_rank_holds_what_coso_plan_says_of_it(worlds, ranks, stage, dtype):
    ((parameters, held), *_) = on_all(worlds[ranks], "held", dtype, stage)
    config = validate({"model": {"dtype": dtype}, "learner": {"zero_stage": stage, "ranks": ranks}})
    said = learner_states(config, replace(SHAPE, parameters=parameters))
    assert held == pytest.approx(sum(said.values()), rel=0.03), said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(worlds, stage, dtype, ranks):
    norms = []
    for accumulation in (1, 2, 4):
        on_all(worlds[ranks], "make", zero_stage=stage, dtype=dtype)
        on_all(worlds[ranks], "train", range(1), accumulation)
        norms.append(on_all(worlds[ranks], "report")[0].gradient_norm)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nor_does_that_of_adapters(worlds, stage):
    norms = []
    for ranks, accumulation in ((1, 1), (1, 4), (2, 2)):
        on_all(worlds[ranks], "make", zero_stage=stage, dtype="bfloat16", adapters=True)
        on_all(worlds[ranks], "train", range(1), accumulation)
        norms.append(on_all(worlds[ranks], "report")[0].gradient_norm)
    assert norms[0] > 0.01
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_moves_no_weight_and_leaves_nothing(worlds, stage, dtype, poison):
    """One rank breaks its last loss of several: all ranks leave the step out, and the next step is as without it."""
    ranks = worlds[2]
    on_all(ranks, "make", zero_stage=stage, dtype=dtype)
    on_all(ranks, "train", range(2), 2)
    before = on_all(ranks, "weights")
    on_all(ranks, "train", range(2, 3), 2, poison=poison)
    assert [report.applied for report in on_all(ranks, "report")] == [False, False]
    for rank, weights in enumerate(on_all(ranks, "weights")):
        np.testing.assert_equal(weights, before[rank])
    on_all(ranks, "train", range(3, 4), 2)
    assert on_all(ranks, "report")[0].applied
    after = on_all(ranks, "weights")[0]
    on_all(ranks, "make", zero_stage=stage, dtype=dtype)
    on_all(ranks, "train", range(2), 2)
    on_all(ranks, "train", range(3, 4), 2)
    for name, expected in on_all(ranks, "weights")[0].items():
        np.testing.assert_allclose(after[name], expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_loss_may_leave_a_parameter_out(worlds, stage):
    on_all(worlds[2], "make", zero_stage=stage)
    before = on_all(worlds[2], "weights")[0]
    losses = on_all(worlds[2], "train", range(6), 1, False)[0]
    after = on_all(worlds[2], "weights")[0]
    assert losses[3] < losses[0]
    np.testing.assert_array_equal(before["value_head.weight"], after["value_head.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_exact(worlds, tmp_path, stage, dtype):
    ranks = worlds[2]
    on_all(ranks, "make", zero_stage=stage, dtype=dtype)
    on_all(ranks, "train", range(4), 2)
    on_all(ranks, "save", tmp_path / "deepspeed")
    uninterrupted = on_all(ranks, "train", range(4, 8), 2)[0], on_all(ranks, "weights")[0]
    on_all(ranks, "make", zero_stage=stage, dtype=dtype)
    on_all(ranks, "load", tmp_path / "deepspeed")
    resumed = on_all(ranks, "train", range(4, 8), 2)[0], on_all(ranks, "weights")[0]
    assert resumed[0] == uninterrupted[0]
    for name, expected in uninterrupted[1].items():
        np.testing.assert_array_equal(resumed[1][name], expected, err_msg=name)


def test_a_failed_write_is_an_error_on_every_rank(worlds, tmp_path):
    """A real failing disk: one rank's state file is a link to a device that is always full."""
    ranks = worlds[2]
    on_all(ranks, "make", zero_stage=1)
    on_all(ranks, "train", range(1), 1)
    on_all(ranks, "save", tmp_path)
    files = sorted((tmp_path / "state").glob("*zero_pp_rank_1*"))
    assert len(files) == 1
    files[0].unlink()
    files[0].symlink_to("/dev/full")
    for rank in [rank.save.remote(tmp_path) for rank in ranks]:
        with pytest.raises(OSError, match="rank 1: .*No space left"):
            ray.get(rank, timeout=60)


def test_state_that_names_code_is_refused(worlds, tmp_path):
    """State files are read by the restricted unpickler: one that would call a function is an error, not a call."""
    on_all(worlds[1], "make", zero_stage=0)
    on_all(worlds[1], "train", range(1), 1)
    on_all(worlds[1], "save", tmp_path)
    (file,) = (tmp_path / "state").glob("*.pt")
    torch.save({"module": Calls(str(tmp_path / "called"))}, file)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        on_all(worlds[1], "load", tmp_path)
    assert not (tmp_path / "called").exists()


class Calls:
    """Unpickles to the result of making a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_ranks_of_one_machine_listen_on_loopback_only(worlds):
    on_all(worlds[2], "make", zero_stage=0)
    addresses = {address for found in on_all(worlds[2], "listening") for address in found}
    assert addresses == {"127.0.0.1"}
