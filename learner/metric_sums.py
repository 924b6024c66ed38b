"""Metrics of an update, added up over micro-batches without waiting for the device, then over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from learner.engine import DeepSpeedEngine


class MetricSums:
    """Weighted sums of per-sample metrics; of a name that ends in `_max`, the largest."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, metrics: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        """metrics: float32 (B,) each; weight: float32 (B,), 0 for a sample that only fills up."""
        import torch

        for name, values in {**metrics, "samples": torch.ones_like(weight)}.items():
            weighted = (values * weight).double()
            if name.endswith("_max"):
                total = torch.maximum(self._sums.get(name, weighted.new_zeros(())), weighted.amax())
            else:
                total = self._sums.get(name, 0.0) + weighted.sum()
            self._sums[name] = total

    @classmethod
    def of(cls, several: Iterable[MetricSums]) -> MetricSums:
        """The sums of all of them."""
        total = cls()
        for each in several:
            for name, value in each._sums.items():
                so_far = total._sums.get(name)
                if so_far is not None:
                    value = so_far.maximum(value) if name.endswith("_max") else so_far + value
                total._sums[name] = value
        return total

    def means(self, engine: DeepSpeedEngine) -> dict[str, float]:
        """The mean per sample over all ranks, or the largest. All ranks must call it."""
        import torch

        names = sorted(self._sums)
        place = engine.place
        table = np.zeros((place.world_size, len(names)))
        table[place.rank] = torch.stack([self._sums[name] for name in names]).tolist()  # waits once, for all of them
        columns = dict(zip(names, engine.sum_over_ranks(table).T, strict=True))
        samples = columns.pop("samples").sum()
        return {
            name: float(column.max() if name.endswith("_max") else column.sum() / samples)
            for name, column in columns.items()
        }
