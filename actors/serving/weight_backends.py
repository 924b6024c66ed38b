"""The code that runs inside vLLM's workers (`worker_extension_cls`). Its import registers the weight backend `coso`.

The backend reads safetensors files, or receives a broadcast by gloo or NCCL, tensor by tensor. It loads the weights by
vLLM's layer-wise reload. NCCL needs GPUs and has not run on the CPU machines where the rest is tested.
"""

from __future__ import annotations

from _multiprocessing import sem_unlink
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from actors.serving.adapters.slot import AdapterSlot
from actors.serving.broadcast_groups import BroadcastGroup, join_group
from actors.serving.held_weights import Fingerprint, HeldWeights, checkpoint_fingerprints, fingerprinted
from actors.serving.weight_transfer import checksummed
from actors.settings import Transport

BACKEND = "coso"


@dataclass
class GroupInfo(WeightTransferInitInfo):
    """The group in which this engine's workers receive broadcasts; `rank_offset` is the rank of the first worker."""

    transport: Transport
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    deadline_s: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Either safetensors files to read, or the names, dtypes and shapes of the tensors that will be broadcast."""

    paths: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)


class CosoWeightTransferEngine(WeightTransferEngine[GroupInfo, UpdateInfo]):
    """Loads files and broadcasts, in checkpoint format, into a live model."""

    init_info_cls = GroupInfo
    update_info_cls = UpdateInfo
    _group: BroadcastGroup | None = None
    #: Of the tensors of the last update that the model's loader was given.
    received: dict[str, int]
    #: Of the same tensors.
    fingerprints: dict[str, Fingerprint]

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Connect to the learner and the other engines; an older group is dropped."""
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = None
        self._group = join_group(
            init_info.transport,
            init_info.master_address,
            init_info.master_port,
            rank,
            init_info.world_size,
            init_info.deadline_s,
        )

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.received, self.fingerprints = {}, {}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        model: Any = self.model  # vLLM's models have load_weights, but their base class does not declare it
        model.load_weights(fingerprinted(checksummed(self.tensors(update_info), self.received), self.fingerprints))

    def tensors(self, update_info: UpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of all that an update brings."""
        return self._read(update_info.paths) if update_info.paths else self._receive(update_info)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_heads(self.model)

    def shutdown(self) -> None:
        self._group = None

    def _read(self, paths: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, file.get_tensor(name)

    def _receive(self, info: UpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        if self._group is None:
            raise RuntimeError("this engine should receive a broadcast of weights but has not joined a group")
        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self._group.device)
            self._group.broadcast(tensor)
            yield name, tensor


def _repack_tied_heads(model: Any) -> None:
    # On CPU, vLLM multiplies by a packed copy of the output head. A reload writes the new weights into the embedding
    # that a tied head shares, but does not change that copy, so pack it again.
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    for module in model.modules():
        if hasattr(module, "cpu_linear") and isinstance(
            getattr(module, "quant_method", None), UnquantizedEmbeddingMethod
        ):
            module.quant_method.process_weights_after_loading(module)


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    weight_transfer_engine: Any  # the worker's
    model_runner: Any  # the worker's
    _held: HeldWeights | None = None
    _adapter: AdapterSlot | None = None

    def begin_adapter(self, rank: int, alpha: float) -> None:
        """Make the engine's adapter, with B = 0."""
        runner = self.model_runner
        self._adapter = AdapterSlot(runner.get_model(), runner.lora_manager, rank, alpha)

    def load_adapter(self, update_info: dict[str, Any]) -> tuple[dict[str, int], int, list[str]]:
        """Replace the adapter by an update's. Returns the checksums of the tensors that it brought, how many the
        model was seen to hold, and the layers that hold others."""
        if self._adapter is None:
            raise RuntimeError("this engine was started without an adapter")
        engine = self.weight_transfer_engine
        received: dict[str, int] = {}
        self._adapter.load(dict(checksummed(engine.tensors(engine.parse_update_info(update_info)), received)))
        return received, *self._adapter.compare()

    def remember_held_weights(self, folder: str) -> None:
        """Learn which piece of the model is which tensor of the folder that it was just loaded from."""
        model = self.model_runner.get_model()
        dtype = self.model_runner.model_config.dtype
        self._held = HeldWeights(model, checkpoint_fingerprints(Path(folder), dtype))

    def compare_held_weights(self) -> tuple[int, list[str]] | None:
        """After a weight update, how many tensors the model was seen to hold as given, and the pieces that it does not
        (`HeldWeights.compare`); None where it is not known what was given or held."""
        given = getattr(self.weight_transfer_engine, "fingerprints", None)
        if given is None or self._held is None:
            return None
        equal, wrong = self._held.compare(given)
        return len(equal), wrong

    def received_checksums(self) -> dict[str, int] | None:
        """Checksums of the tensors that the last weight update gave to the model's loader; None before the first."""
        return getattr(self.weight_transfer_engine, "received", None)

    def unlink_own_semaphores(self) -> None:
        """Remove the names of this process's semaphores from shared memory; the semaphores keep working.

        Python removes such a name at a normal exit only, so a kill would leave it behind. Nothing opens these
        semaphores by name: the worker has no child processes.
        """
        # /proc/self/maps shows the temporary names with which libc creates them, so compare inodes.
        mapped = {
            int(line.split()[4]) for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/sem." in line
        }
        for path in Path("/dev/shm").glob("sem.mp-*"):
            try:
                own = path.stat().st_ino in mapped
            except FileNotFoundError:
                continue  # it was another process's and is gone now
            if own:
                name = "/" + path.name.removeprefix("sem.")
                sem_unlink(name)
                resource_tracker.unregister(name, "semaphore")


WeightTransferEngineFactory.register_engine(BACKEND, CosoWeightTransferEngine)
if current_platform.is_cpu():
    cpu_platform: Any = type(current_platform)
    cpu_platform.get_punica_wrapper = classmethod(lambda cls: "actors.serving.adapters.one_adapter.OneAdapterCPU")
