"""The weight transfer between GPUs: does vLLM's communicator start as the learner starts it, and how fast is it?

    python -m benchmarks.gpu.nccl [--mib 1024]

Rank 0 is `CollectivePublisher`, which broadcasts random tensors; the other ranks, one per GPU beside the first, receive
as vLLM's workers do. NCCL takes no two ranks on one GPU, so this needs two GPUs or more.
"""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

from benchmarks.gpu.card import arguments, finish, print_table

DEADLINE_S = 60.0
TENSORS = 16


def receive(address: str, port: int, rank: int, world: int, shape: tuple[int, ...], answer: Any) -> None:
    """A rank beside the learner's: receives every tensor and answers with its checksums."""
    import torch

    from actors.serving.broadcast_groups import join_group
    from actors.serving.weight_transfer import tensor_checksum

    torch.cuda.set_device(rank)
    group = join_group("nccl", address, port, rank, world, DEADLINE_S)
    sums = {}
    for index in range(TENSORS):
        tensor = torch.empty(shape, device=group.device, dtype=torch.bfloat16)
        group.broadcast(tensor)
        sums[str(index)] = tensor_checksum(tensor)
    answer.put(sums)


def main() -> None:
    settings = arguments(__doc__, mib=1024)
    if settings.device == "cpu":
        raise SystemExit("benchmarks.gpu.nccl needs a GPU: NCCL has no CPU to rehearse on")
    import torch

    from learner.publish import CollectivePublisher

    gpus = torch.cuda.device_count()
    if gpus < 2:
        raise SystemExit(f"benchmarks.gpu.nccl needs two GPUs or more, and sees {gpus}")
    shape = (settings.mib * 2**20 // 2 // TENSORS // 1024, 1024)
    publisher = CollectivePublisher("nccl")
    begun = time.perf_counter()
    group = publisher.open(gpus - 1, 1, "127.0.0.1", DEADLINE_S)
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    others = [
        spawn.Process(target=receive, args=("127.0.0.1", group.port, rank, group.world_size, shape, answers))
        for rank in range(1, gpus)
    ]
    for process in others:
        process.start()
    publisher.connect()
    started = time.perf_counter() - begun
    tensors = [(str(index), torch.randn(shape, device="cuda", dtype=torch.bfloat16)) for index in range(TENSORS)]
    update = publisher.publish(1, tensors)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    publisher.send(iter(tensors))
    spent = time.perf_counter() - begun
    for _ in others:
        if answers.get(timeout=DEADLINE_S) != dict(update.checksums):
            raise SystemExit("a rank received other tensors than were sent")
    for process in others:
        process.join(DEADLINE_S)
    row = {"gpus": gpus, "start_s": started, "mib": settings.mib, "send_s": spent}
    row["gib_per_s"] = settings.mib / 1024 / spent
    print_table("NCCL weight transfer", [row])
    finish("nccl", settings, row)


if __name__ == "__main__":
    main()
