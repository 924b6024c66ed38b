"""Groups of processes in which the learner, rank 0, broadcasts weights to engines: by gloo between CPUs, NCCL between
GPUs. They do not touch the other groups of these processes, and every wait has a deadline.

NCCL itself waits without end for a rank that failed or never came, and nothing can stop a thread that waits in it. So
every call into NCCL runs in a thread of its own, which is left behind when the deadline passes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from actors.addresses import own_address
from actors.serving.weight_transfer import WeightTransferError
from actors.settings import Transport

if TYPE_CHECKING:
    import torch

#: The key under which rank 0 stores the id of the NCCL group.
_ID_KEY = "coso-nccl-id"


class BroadcastGroup(Protocol):
    """Ranks that are connected."""

    device: torch.device  # where the tensors to broadcast have to be

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0 sends the contiguous tensor; all other ranks receive into it. Raises `WeightTransferError`; the group
        is of no use after that."""


def join_group(
    transport: Transport, address: str, port: int, rank: int, world_size: int, deadline_s: float
) -> BroadcastGroup:
    """Blocks until all ranks are connected. Raises `WeightTransferError` past the deadline, which is also that of each
    broadcast."""
    kind: type[NcclGroup] | type[GlooGroup] = NcclGroup if transport == "nccl" else GlooGroup
    return kind(address, port, rank, world_size, deadline_s)


class GlooGroup:
    """Ranks on CPUs."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, deadline_s: float) -> None:
        import torch
        import torch.distributed as torch_distributed

        dist: Any = torch_distributed  # its gloo classes come from C++ and have no complete types
        timeout = timedelta(seconds=deadline_s)
        try:
            store = rendezvous_store(address, port, rank, world_size, timeout)
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timeout
            # Listen where the other members are: loopback on one machine. gloo otherwise takes the address that the
            # host name resolves to, which other machines may not reach.
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(address))]
            self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore("coso-weights", store), rank, world_size, options)
        except (RuntimeError, ValueError) as error:
            raise WeightTransferError(
                f"rank {rank} of {world_size} did not connect to the others for weight sync at {address}:{port} within "
                f"{deadline_s:.0f} s: {str(error).splitlines()[0]}"
            ) from error
        self._store = store  # rank 0's serves the others
        self._rank = rank
        self.device = torch.device("cpu")

    def broadcast(self, tensor: torch.Tensor) -> None:
        import torch.distributed as dist

        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            self._group.broadcast([tensor], options).wait()
        except RuntimeError as error:
            raise WeightTransferError(
                f"the broadcast of weights failed at rank {self._rank}: {str(error).splitlines()[0]}. "
                "Connect learner and servers again."
            ) from error


class NcclGroup:
    """Ranks on GPUs, one each, by vLLM's communicator."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, deadline_s: float) -> None:
        import torch

        # With its index, since vLLM compares it with that of tensors.
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._rank = rank
        self._deadline_s = deadline_s
        ends = time.monotonic() + deadline_s
        try:
            store = rendezvous_store(address, port, rank, world_size, timedelta(seconds=deadline_s))
            left = max(0.0, ends - time.monotonic())
            self._communicator = within(left, lambda: _communicator(store, rank, world_size, self.device))
        except Exception as error:
            raise WeightTransferError(
                f"rank {rank} of {world_size} did not connect to the others by NCCL for weight sync at "
                f"{address}:{port} (deadline {deadline_s:.0f} s): {_first_line(error)}"
            ) from error
        self._store = store  # rank 0's serves the others

    def broadcast(self, tensor: torch.Tensor) -> None:
        import torch

        stream = torch.cuda.current_stream(self.device)
        data = tensor.reshape(-1).view(torch.uint8)  # NCCL has no name for some dtypes

        def send() -> None:
            with torch.cuda.device(self.device):  # every thread has its own
                self._communicator.broadcast(data, src=0, stream=stream)
                stream.synchronize()

        try:
            within(self._deadline_s, send)
        except Exception as error:
            self._communicator.destroy()  # ends what waits on the GPU
            raise WeightTransferError(
                f"the broadcast of weights failed at rank {self._rank}: {_first_line(error)}. "
                "Connect learner and servers again."
            ) from error


def _communicator(store: Any, rank: int, world_size: int, device: torch.device) -> Any:
    """vLLM's communicator of all ranks, connected. Raises what NCCL raises, also where its library is missing."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
    from vllm.utils.nccl import unpinned_nccl_env

    with unpinned_nccl_env():  # settings that vLLM makes for its own groups must not differ between the ranks
        if rank == 0:
            store.set(_ID_KEY, bytes(NCCLLibrary().ncclGetUniqueId().internal))
        communicator = PyNcclCommunicator.from_unique_id_bytes(store.get(_ID_KEY), rank, world_size, device)
    if communicator.disabled:
        raise RuntimeError("vLLM's NCCL communicator is switched off (VLLM_DISABLE_PYNCCL)")
    return communicator


def rendezvous_store(address: str, port: int, rank: int, world_size: int, timeout: timedelta) -> Any:
    """The store that ranks use for their rendezvous. Rank 0 listens at `address` only; PyTorch by default would listen
    at every address of the machine."""
    import socket

    from torch.distributed import TCPStore

    if rank > 0:
        return TCPStore(address, port, world_size, False, timeout)
    listening = socket.create_server((address, port), backlog=world_size)
    return TCPStore(address, port, world_size, True, timeout, master_listen_fd=listening.detach())


def within(deadline_s: float, work: Callable[[], Any]) -> Any:
    """The result of `work`, or what it raised. Raises TimeoutError past the deadline; `work` may go on then."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="nccl", daemon=True).start()
    try:
        return future.result(deadline_s)
    except TimeoutError as error:
        if future.done():
            raise
        raise TimeoutError("no answer in time") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
