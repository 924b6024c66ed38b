"""The course of supervised fine-tuning: which demonstrations, token weights and learning rate at which step."""

from __future__ import annotations

import numpy as np
import torch

from actors.trajectory import TrajectoryBatch
from learner.policy.batch import TokenBatch
from learner.schedules import warm_up_and_decay
from learner.settings import WarmStartSettings
from learner.supervised.loss import informative_token_weights

#: Part of the steps over which the learning rate rises.
WARM_UP_SHARE = 0.05


class SupervisedCourse:
    """Passes over the demonstrations, each in an order of its own, cut into batches; the same on every rank."""

    def __init__(self, demonstrations: TrajectoryBatch, settings: WarmStartSettings, seed: int) -> None:
        """Needs prompt, image, prompt_ids and response_ids of every step. Raises `ValueError` without any."""
        if len(demonstrations) == 0:
            raise ValueError("supervised fine-tuning needs at least one demonstration")
        self.demonstrations = demonstrations
        self.settings = settings
        self.step = 0
        self._seed = seed
        responses = demonstrations.ragged("response_ids", np.int64)
        self._informative = (
            None
            if settings.informative_weight == 1.0
            else informative_token_weights(responses, settings.informative_weight)
        )

    def indices(self) -> np.ndarray:
        """int64 (batch,), row numbers of this step's demonstrations."""
        total, size = len(self.demonstrations), self.settings.batch
        positions = np.arange(self.step * size, (self.step + 1) * size)
        orders = {
            epoch: np.random.default_rng((self._seed, epoch)).permutation(total)
            for epoch in np.unique(positions // total).tolist()
        }
        return np.array([orders[position // total][position % total] for position in positions.tolist()])

    def token_weights(self, indices: np.ndarray, batch: TokenBatch) -> torch.Tensor:
        """float32 (B, R), loss weights of the response tokens of the given demonstrations at this step."""
        if self._informative is None or self.step >= self.settings.informative_share * self.settings.steps:
            return batch.response_mask.float()
        weights = torch.zeros(batch.response_mask.shape)
        for row, index in enumerate(indices.tolist()):
            weights[row, : len(self._informative[index])] = torch.from_numpy(self._informative[index])
        return weights.to(batch.response_mask.device)

    def learning_rate(self) -> float:
        return warm_up_and_decay(self.settings.learning_rate, self.step, self.settings.steps, WARM_UP_SHARE)
