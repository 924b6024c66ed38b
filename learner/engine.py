"""The only place that knows DeepSpeed: one narrow class over its engine, and the few collectives a rank needs.

Gradient accumulation is the caller's (`managed_gradient_accumulation` off): any number of `backward` calls, then one
`step`. DeepSpeed averages gradients over the ranks, so a loss handed to `backward` has to be scaled by
world size / (samples of all ranks) for the sum over ranks and micro-batches to be a mean over samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.addresses import interface_of, own_address
from actors.serving.broadcast_groups import rendezvous_store
from learner.checkpoints.state_files import restricted_checkpoint_engine
from learner.settings import LearnerSettings

if TYPE_CHECKING:
    import torch

#: Longest message about a failure that ranks exchange.
MESSAGE_BYTES = 400


@dataclass(frozen=True)
class RankPlace:
    """The place of one rank among the others, and the address at which they connect."""

    rank: int
    world_size: int
    address: str  # of rank 0
    port: int  # free on rank 0's node


@dataclass(frozen=True)
class StepReport:
    """What an optimizer step did."""

    gradient_norm: float  # of the module, over all ranks, before clipping; infinite where it was not finite
    head_gradient_norm: float  # of the head, likewise
    applied: bool  # whether the weights moved; they stay where a gradient is not finite


class DeepSpeedEngine:
    """A module trained by DeepSpeed ZeRO 0–3, in fp32 or bf16, on CPU (gloo) or CUDA (nccl).

    Making one sets this process up as a rank and joins the process group, waiting for the others no longer than
    `collective_deadline_s`; every later exchange has the same deadline.
    """

    def __init__(self, settings: LearnerSettings, dtype: str, place: RankPlace) -> None:
        """dtype: of the parameters, "float32" or "bfloat16"."""
        self.settings = settings
        self.dtype = dtype
        self.place = place
        _join(settings, place)
        import torch

        self.device = torch.device(settings.device, 0) if settings.device == "cuda" else torch.device("cpu")
        self._engine: Any = None

    # --- training

    def initialize(self, module: torch.nn.Module, head: torch.nn.Module) -> None:
        """Hand the module over to DeepSpeed. Its parameters that do not require a gradient are left alone.

        head: a small module that takes part in the loss but is no part of `module` (a value head). It stays float32
        and whole on every rank whatever `dtype` and stage are, with an AdamW and a gradient clip of its own. Learning
        rates are 0 until `set_learning_rates`.
        """
        import deepspeed
        import torch

        self.optimizer = optimizer = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=0.0,
            betas=self.settings.betas,
            eps=self.settings.epsilon,
            weight_decay=self.settings.weight_decay,
            fused=self.settings.device == "cuda",
        )
        config = _deepspeed_config(self.settings, self.dtype)
        if self.settings.zero_stage == 3:
            # DeepSpeed would move the whole module to the device before it cuts it into the ranks' shares.
            for parameter in module.parameters():
                parameter.data = parameter.data.to(getattr(torch, self.dtype))
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.device)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self._head = list(head.to(self.device).parameters())
        # The settings' betas and epsilon are for the small, careful steps of a policy; a regression needs neither.
        self._head_optimizer = torch.optim.AdamW(self._head, lr=0.0, weight_decay=0.0)
        self._engine.checkpoint_engine = restricted_checkpoint_engine()
        if self.settings.zero_stage == 0 and self.dtype == "float32":
            # The one case in which DeepSpeed clips without keeping the norm.
            self._engine.clip_fp32_gradients = self._clip_whole_gradients
        self._engine.train()

    def _clip_whole_gradients(self) -> None:
        import torch

        parameters = list(self._engine.module.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.gradient_clip)
        self._finite = bool(norm.isfinite())
        if not self._finite:
            for parameter in parameters:
                parameter.grad = None  # AdamW leaves these alone
        self._engine._global_grad_norm = norm if self._finite else float("inf")

    @property
    def module(self) -> torch.nn.Module:
        """The module handed in; its parameters are whole only inside `gather` under stage 3."""
        return self._engine.module

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The module's forward pass. Under stage 3 every rank has to make the same number of passes."""
        return self._engine(*arguments, **named)

    def train(self, mode: bool, checkpointing: bool = False) -> None:
        """Dropout on or off. checkpointing: recompute activations in the backward pass though dropout is off (layers of
        transformers do so in their training mode only)."""
        self._engine.train(mode)
        if checkpointing:
            from transformers.modeling_layers import GradientCheckpointingLayer

            for layer in self.module.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True  # of the layer itself, not of the dropout inside

    @property
    def graphs_may_differ(self) -> bool:
        """Whether two passes may use the module's parts in different orders. Stages 1 and 2 exchange gradients in the
        order in which each rank's backward pass makes them, and stage 3 gathers weights in the order of use."""
        stage = _stage(self.settings, self.dtype)
        return stage == 0 or (stage < 3 and self.place.world_size == 1)

    @property
    def dropout(self) -> bool:
        """Whether dropout is on."""
        return bool(self.module.training)

    @property
    def learning_rate(self) -> float:
        """Of the module, for the coming steps."""
        return float(self._engine.optimizer.param_groups[0]["lr"])

    def set_learning_rates(self, module: float, head: float) -> None:
        """Rates of the coming steps."""
        for optimizer, rate in ((self._engine.optimizer, module), (self._head_optimizer, head)):
            for group in optimizer.param_groups:
                group["lr"] = rate

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar loss to what the next `step` applies."""
        if hasattr(self._engine.optimizer, "clear_lp_grads"):
            # DeepSpeed's BF16_Optimizer adds each backward's gradients to its float32 sum, and clears the module's own
            # by a hook on the forward's outputs, which an output that is a dataclass never fires.
            self._engine.optimizer.clear_lp_grads()
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> StepReport:
        """Average gradients over the ranks, clip them, move the weights, forget the gradients. Where a gradient of the
        module is not finite on any rank, no weight moves on any."""
        self._finite = True
        self._engine.step()
        applied = self._finite and self._engine.was_step_applied()
        norm = self._engine.get_global_grad_norm()
        head_norm = self._step_head(applied)
        return StepReport(
            gradient_norm=float(norm) if norm is not None else 0.0,
            head_gradient_norm=head_norm,
            applied=applied and np.isfinite(head_norm),
        )

    def _step_head(self, wanted: bool) -> float:
        """The head's part of `step`; returns its gradient norm over all ranks, infinite where it is not finite."""
        import torch
        import torch.distributed as distributed

        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._head]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        if self.place.world_size > 1:
            distributed.all_reduce(flat)
            flat /= self.place.world_size
        norm = float(flat.norm())
        if wanted and np.isfinite(norm):
            flat *= min(1.0, self.settings.gradient_clip / (norm + 1e-6))
            for parameter, gradient in zip(self._head, flat.split([p.numel() for p in self._head]), strict=True):
                parameter.grad = gradient.view_as(parameter)
            self._head_optimizer.step()
        self._head_optimizer.zero_grad()
        return norm if np.isfinite(norm) else float("inf")

    def gradients(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Gradient of a scalar over each trained parameter of the module, on this rank alone, leaving what `backward`
        collects as it is. Not under stage 3, where no rank has a whole parameter."""
        import torch

        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, found, strict=True)
        ]

    def norm_over_ranks(self, gradients: Iterable[torch.Tensor]) -> float:
        """Norm of the mean over ranks of gradients that each rank has summed up for itself. All ranks must call it."""
        import torch
        import torch.distributed as distributed

        squares = []
        for gradient in gradients:
            if self.place.world_size > 1:
                distributed.all_reduce(gradient)
                gradient = gradient / self.place.world_size
            squares.append(gradient.float().square().sum())
        return float(torch.stack(squares).double().sum()) ** 0.5

    # --- the head's own state, the same on every rank

    def head_state(self) -> dict[str, torch.Tensor]:
        """AdamW's state of the head: `I.exp_avg`, `I.exp_avg_sq`, `I.step` of its I-th parameter."""
        stored = self._head_optimizer.state_dict()["state"]
        return {f"{index}.{key}": value.cpu() for index, state in stored.items() for key, value in state.items()}

    def load_head_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `head_state` returned."""
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        self._head_optimizer.load_state_dict({**self._head_optimizer.state_dict(), "state": state})

    # --- whole parameters and state

    def gather(self, parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        """Within the context the given parameters are whole on every rank (a collective under stage 3; under the
        other stages they always are). For reading only."""
        if self.settings.zero_stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))

    def save(self, folder: Path, tag: str) -> None:
        """Every rank writes its share of weights, optimizer state and counters to folder/tag; frozen parameters are
        left out. All ranks must call it. Raises `OSError` on every rank when any rank could not write."""
        writer = self._engine.checkpoint_engine
        self.together(
            f"writing optimizer state to {folder}",
            lambda: folder.mkdir(parents=True, exist_ok=True) if self.place.rank == 0 else None,
        )
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        self.together(f"writing optimizer state to {folder}", writer.raise_failure)

    def load(self, folder: Path, tag: str) -> None:
        """Restore what `save` wrote, at the same world size and stage. Raises `FileNotFoundError`."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        if path is None:
            raise FileNotFoundError(f"{folder / tag} holds no DeepSpeed state of this learner")

    # --- exchanges between ranks (all ranks must take part)

    def sum_over_ranks(self, values: np.ndarray) -> np.ndarray:
        """Element by element, in float64; the same result on every rank."""
        import torch
        import torch.distributed as distributed

        if self.place.world_size == 1:
            return np.asarray(values, dtype=np.float64)
        tensor = torch.from_numpy(np.array(values, dtype=np.float64)).to(self.device)
        distributed.all_reduce(tensor)
        return tensor.cpu().numpy()

    def together(self, what: str, action: Callable[[], None]) -> None:
        """Run `action` on this rank and wait for the others. An `OSError` on any rank is raised on all of them, so
        that none goes on to wait for a rank that has given up."""
        failure: OSError | None = None
        try:
            action()
        except OSError as error:
            failure = error
        messages = np.zeros((self.place.world_size, MESSAGE_BYTES))
        if failure is not None:
            text = f"rank {self.place.rank}: {failure}".encode()[:MESSAGE_BYTES]
            messages[self.place.rank, : len(text)] = list(text)
        messages = self.sum_over_ranks(messages).astype(np.uint8)
        texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in messages if row.any()]
        if texts:
            raise OSError(f"{what}: {'; '.join(texts)}") from failure


def _join(settings: LearnerSettings, place: RankPlace) -> None:
    """Set the environment DeepSpeed reads at import, then join the process group (once per process)."""
    on_cpu = settings.device == "cpu"
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK="0",  # every rank sees only its own device
        WORLD_SIZE=str(place.world_size),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
        OMP_NUM_THREADS=str(settings.rank_threads),
        DS_ACCELERATOR="cpu" if on_cpu else "cuda",
    )
    if on_cpu:
        # gloo otherwise listens on the interface that the host name resolves to: open to the network where all ranks
        # share a node, and loopback on many a machine, where they do not.
        os.environ["GLOO_SOCKET_IFNAME"] = interface_of(own_address(place.address))
    import torch

    torch.set_num_threads(settings.rank_threads)
    import logging

    import deepspeed
    import deepspeed.utils

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Else DeepSpeed compiles a C++ helper for CPU collectives at the first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if on_cpu else "nccl"
    deadline = timedelta(seconds=settings.collective_deadline_s)
    if not torch.distributed.is_initialized():
        store = rendezvous_store(place.address, place.port, place.rank, place.world_size, deadline)
        torch.distributed.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world_size, timeout=deadline
        )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=deadline)


def _stage(settings: LearnerSettings, dtype: str) -> int:
    """The ZeRO stage that DeepSpeed is told."""
    # DeepSpeed's stage 0 adds up gradients in bfloat16, where small micro-batches are rounded away. Stage 1 takes the
    # same steps, adds up in fp32 and on one rank is the same thing.
    return 1 if settings.zero_stage == 0 and dtype == "bfloat16" else settings.zero_stage


def _deepspeed_config(settings: LearnerSettings, dtype: str) -> dict[str, Any]:
    stage = _stage(settings, dtype)
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return {
        # Sizes only matter to DeepSpeed's own data loader and counters, which are not used.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.gradient_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
