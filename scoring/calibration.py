"""Calibration: of the predictions made with confidence p, is a share p right? Of the states valued v, is the mean
return v?

A reliability curve puts predictions into bins and compares each bin's mean prediction with what was observed. The
expected calibration error (ECE; Naeini et al. 2015, Guo et al. 2017) is the mean distance of the two, weighted by the
number of predictions in each bin. Policy, critic and SCM are all measured with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 10

#: Marks the keys of a curve's points among metrics.
POINT = "reliability_"
_COLUMNS = ("predicted", "observed", "count")


@dataclass(frozen=True)
class ReliabilityCurve:
    """The bins that hold any prediction, in order of the prediction.

    predicted, observed: float64 (m,), means over each bin's predictions and outcomes. count: int64 (m,), their number.
    """

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    count: NDArray[np.int64]

    @property
    def error(self) -> float:
        """The ECE, in the unit of the predictions."""
        return float((self.count * np.abs(self.observed - self.predicted)).sum() / self.count.sum())

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """The points as `PREFIXreliability_I_predicted`, `…_observed`, `…_count`, I from 0; `read_curve` undoes it."""
        return {
            f"{prefix}{POINT}{point}_{name}": float(value)
            for name, column in zip(_COLUMNS, (self.predicted, self.observed, self.count), strict=True)
            for point, value in enumerate(column)
        }


def read_curve(row: Mapping[str, Any], prefix: str) -> ReliabilityCurve | None:
    """The curve that `ReliabilityCurve.metrics(prefix)` put into a row of metrics; None where there is none."""
    points: list[list[float]] = []
    while None not in (point := [row.get(f"{prefix}{POINT}{len(points)}_{name}") for name in _COLUMNS]):
        points.append([float(value) for value in point if value is not None])
    if not points:
        return None
    predicted, observed, count = np.array(points).T
    return ReliabilityCurve(predicted, observed, count.astype(np.int64))


def of_probabilities(confidences: ArrayLike, correct: ArrayLike, bins: int = BINS) -> ReliabilityCurve:
    """Bins of equal width in [0, 1], each with its upper edge; the first one includes 0.

    confidences: (N,) in [0, 1], N >= 1. correct: (N,) bool, whether each prediction was right.
    Raises ValueError on other shapes, on N = 0 and on confidences outside [0, 1].
    """
    confidence, right = _checked(confidences, correct)
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"confidences must be in [0, 1]: {confidence.min()} to {confidence.max()}")
    return _curve(confidence, right, np.linspace(0.0, 1.0, bins + 1)[1:])


def of_values(values: ArrayLike, returns: ArrayLike, bins: int = BINS) -> ReliabilityCurve:
    """Up to `bins` bins of about equally many values; equal values share a bin.

    values, returns: (N,), N >= 1, in one unit. Raises ValueError on other shapes, on N = 0 and on values that are not
    finite.
    """
    value, outcome = _checked(values, returns)
    if not (np.isfinite(value).all() and np.isfinite(outcome).all()):
        raise ValueError("values and returns must be finite")
    last = -(-len(value) * np.arange(1, bins + 1) // bins) - 1  # of each bin, if all values differ
    return _curve(value, outcome, np.unique(np.sort(value)[last]))


def _checked(predictions: ArrayLike, outcomes: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    predicted, observed = np.asarray(predictions, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if predicted.ndim != 1 or predicted.shape != observed.shape or not len(predicted):
        raise ValueError(f"give one prediction per outcome, at least one: {predicted.shape} and {observed.shape}")
    return predicted, observed


def _curve(
    predicted: NDArray[np.float64], observed: NDArray[np.float64], upper: NDArray[np.float64]
) -> ReliabilityCurve:
    """upper: the bins' upper edges, increasing; each prediction is in the first bin whose edge is not below it."""
    which = np.searchsorted(upper, predicted, side="left")
    counts = np.bincount(which)
    some = counts > 0
    means = [np.bincount(which, weights=values)[some] / counts[some] for values in (predicted, observed)]
    return ReliabilityCurve(means[0], means[1], counts[some])
