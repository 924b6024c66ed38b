"""The optimizer's state in host memory while the learner does not train, so that others on its GPU have room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from learner.settings import LearnerSettings


class OffloadedState:
    """What an optimizer keeps beside the weights of a module: AdamW's moments, and the float32 weights that DeepSpeed
    has besides those of another precision. With `learner.offload_optimizer`, it is in host memory except within
    `at_hand`.

    DeepSpeed has views of these tensors in many places. So the tensors stay where they are, and their memory is freed
    beneath them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, module: torch.nn.Module, settings: LearnerSettings) -> None:
        self._optimizer = optimizer
        self._module = module
        self._settings = settings
        self._away: list[tuple[torch.UntypedStorage, torch.Tensor]] = []  # freed memory, and what was in it
        self._host: list[torch.Tensor] = []  # kept from one time to the next: page-locked memory is slow to get
        self._put_away()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """For the length of the block the state is where the optimizer takes its steps."""
        for storage, held in self._away:
            storage.resize_(len(held))
            _bytes_of(storage).copy_(held)
        self._away = []
        try:
            yield
        finally:
            self._put_away()

    def _put_away(self) -> None:
        for index, storage in enumerate(self._storages() if self._settings.offload_optimizer else []):
            on_gpu = storage.device.type == "cuda"
            if index == len(self._host):
                self._host.append(torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu))
            elif len(self._host[index]) != storage.nbytes():
                self._host[index] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
            self._away.append((storage, self._host[index].copy_(_bytes_of(storage))))
            storage.resize_(0)
        if self._settings.device == "cuda" and (self._settings.gpu_share < 1 or self._away):
            torch.cuda.empty_cache()  # PyTorch otherwise keeps what it does not use

    def _storages(self) -> list[torch.UntypedStorage]:
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._module.parameters()}
        found: dict[int, torch.UntypedStorage] = {}
        for parameter, state in self._optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and not value.untyped_storage().resizable():
                    state[name] = value.clone()  # it was read from a checkpoint
            for tensor in (parameter, *(value for value in state.values() if isinstance(value, torch.Tensor))):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return [storage for address, storage in found.items() if address not in weights and storage.nbytes()]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
