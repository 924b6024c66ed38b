"""What runs inside vLLM's workers (`worker_extension_cls`): importing it registers the weight sync backend `coso`.

The backend loads a safetensors file, or receives a gloo broadcast with the payloads of vLLM's own NCCL backend, through
vLLM's layer-wise reload. NCCL itself is vLLM's backend `nccl`, used as it is; it needs GPUs and has not been run on the
CPU machines where this is tested.
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

from actors.serving.weight_transfer import GlooGroup

BACKEND = "coso"


@dataclass
class GroupInfo(WeightTransferInitInfo):
    """Where this engine's workers meet the learner for broadcasts; `rank_offset` is the first worker's rank."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    deadline_s: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Either a safetensors file to read, or the names, dtypes and shapes of what will be broadcast."""

    path: str | None = None
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)


class CosoWeightTransferEngine(WeightTransferEngine[GroupInfo, UpdateInfo]):
    """Files and gloo broadcasts into a live model, in checkpoint format."""

    init_info_cls = GroupInfo
    update_info_cls = UpdateInfo
    _group: GlooGroup | None = None

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Meet the learner and the other engines; an older group is given up."""
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = None
        self._group = GlooGroup(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.deadline_s
        )

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        tensors = self._read(update_info.path) if update_info.path else self._receive(update_info)
        model: Any = self.model  # vLLM's models have load_weights; its base class does not say so
        model.load_weights(tensors)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_heads(self.model)

    def shutdown(self) -> None:
        self._group = None

    def _read(self, path: str) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)

    def _receive(self, info: UpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        if self._group is None:
            raise RuntimeError("a broadcast of weights was announced to an engine that has not joined its group")
        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self._group.broadcast(tensor)
            yield name, tensor


def _repack_tied_heads(model: Any) -> None:
    # vLLM on CPU multiplies by a packed copy of the output head. Reloading writes the new weights into the embedding
    # that a tied head shares, but leaves that copy as it was; so it is made again.
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    for module in model.modules():
        if hasattr(module, "cpu_linear") and isinstance(
            getattr(module, "quant_method", None), UnquantizedEmbeddingMethod
        ):
            module.quant_method.process_weights_after_loading(module)


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    def unlink_own_semaphores(self) -> None:
        """Take away the names in shared memory of this process's semaphores, which it goes on using.

        Python keeps such a name until the process ends well; after a kill it would be left behind. Nothing opens these
        by name: the worker has no child processes.
        """
        # /proc/self/maps shows them under the temporary names that libc makes them with: tell them by inode.
        mapped = {
            int(line.split()[4]) for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/sem." in line
        }
        for path in Path("/dev/shm").glob("sem.mp-*"):
            try:
                own = path.stat().st_ino in mapped
            except FileNotFoundError:
                continue  # another process's, gone meanwhile
            if own:
                name = "/" + path.name.removeprefix("sem.")
                sem_unlink(name)
                resource_tracker.unregister(name, "semaphore")


WeightTransferEngineFactory.register_engine(BACKEND, CosoWeightTransferEngine)
