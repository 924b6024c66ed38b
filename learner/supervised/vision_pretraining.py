"""Pre-training of a vision tower: read the state off a picture with one linear layer.

A vision tower made at random learns slowly from the words of an answer alone. Here its image features learn to predict
the environment's own state labels through a linear read-out, which is then thrown away. Only the warm start uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from learner.policy.batch import concatenate_padded

#: What `get_image_features` takes besides the pixels, family by family, as the processors name it.
_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


def pretrain_vision(
    vlm: Any,
    image_inputs: Sequence[dict[str, Tensor]],
    labels: np.ndarray,
    label_sizes: Sequence[int],
    *,
    steps: int,
    batch: int = 32,
    learning_rate: float,
    seed: int = 0,
) -> list[float]:
    """Train `vlm`'s image features, in place, to give the labels away linearly; returns the loss of each step.

    vlm: a Hugging Face model with `get_image_features`; image_inputs: per picture, what the processor made of it and a
    prompt (every picture of the same shape); labels int (N, K) with label k in 0…label_sizes[k]−1, or −1 where it does
    not apply. Loss: cross-entropy in nats, summed over labels. Weights the features do not depend on stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in image_inputs[0] if name not in _TEXT_INPUTS]
    targets = torch.as_tensor(np.asarray(labels), dtype=torch.int64)

    def features(rows: Tensor) -> Tensor:
        """(pictures, width): the mean over a picture's tokens."""
        inputs = {name: concatenate_padded([image_inputs[row][name] for row in rows]) for name in names}
        output = vlm.get_image_features(**inputs)
        found = getattr(output, "pooler_output", output)
        if not isinstance(found, Tensor):
            found = torch.cat(list(found))
        return found.float().reshape(len(rows), -1, found.shape[-1]).mean(1)

    with torch.no_grad():
        width = features(torch.zeros(1, dtype=torch.int64)).shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        readout = nn.Linear(width, sum(label_sizes))
    parameters = [*vlm.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(image_inputs), (batch,), generator=generator)
        logits = readout(features(rows)).split(list(label_sizes), dim=1)
        loss = torch.stack(
            [
                functional.cross_entropy(part, targets[rows, label], ignore_index=-1, reduction="sum") / batch
                for label, part in enumerate(logits)
            ]
        ).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
