"""Calibration: of the predictions made with confidence p, is a share p right?

The expected calibration error (ECE; Naeini et al. 2015, Guo et al. 2017) puts predictions into equal bins
of confidence and averages, weighted by their number, how far each bin's accuracy is from its mean
confidence.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """One point of a reliability curve: predictions with confidence in (low, high]; the first bin includes 0.

    confidence and accuracy are the means over the bin's predictions, in [0, 1]; both are 0 where count is 0.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def expected_calibration_error(
    confidences: ArrayLike, correct: ArrayLike, bins: int = 10
) -> tuple[float, list[CalibrationBin]]:
    """Return the ECE, in [0, 1], and the reliability curve, one entry per bin in order of confidence.

    confidences: (N,) in [0, 1], N >= 1. correct: (N,) bool, whether each prediction was right.
    Raises ValueError on other shapes, on N = 0 and on confidences outside [0, 1].
    """
    confidence = np.asarray(confidences, dtype=np.float64)
    right = np.asarray(correct, dtype=np.float64)
    if confidence.ndim != 1 or confidence.shape != right.shape or not len(confidence):
        raise ValueError(f"give one confidence per outcome, at least one: {confidence.shape} and {right.shape}")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"confidences must be in [0, 1]: {confidence.min()} to {confidence.max()}")
    edges = np.linspace(0.0, 1.0, bins + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    whole = np.maximum(counts, 1)
    mean_confidence = np.bincount(which, weights=confidence, minlength=bins) / whole
    accuracy = np.bincount(which, weights=right, minlength=bins) / whole
    error = float((counts * np.abs(accuracy - mean_confidence)).sum() / counts.sum())
    curve = [
        CalibrationBin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            count=int(counts[i]),
            confidence=float(mean_confidence[i]),
            accuracy=float(accuracy[i]),
        )
        for i in range(bins)
    ]
    return error, curve
