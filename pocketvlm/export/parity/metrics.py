"""How close two arrays are: the numbers that a parity certificate is made of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["CEILING_DB", "Floats", "cosine", "relative_error", "sqnr_db", "total_variation"]

Floats = npt.NDArray[np.float32]

CEILING_DB = 200.0
"""What stands for no noise at all: JSON has no infinity."""


def relative_error(found: Floats, expected: Floats) -> float:
    """Frobenius norm of the difference over that of what was expected; infinite for NaN."""
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged artifact may return anything
        noise = float(np.linalg.norm(found.astype(np.float64) - expected))
    signal = float(np.linalg.norm(expected.astype(np.float64)))
    if not np.isfinite(noise):
        return float("inf")
    if signal == 0:
        return 0.0 if noise == 0 else float("inf")
    return noise / signal


def sqnr_db(found: Floats, expected: Floats) -> float:
    """Signal to noise in decibels: 20 log10(|expected| / |found - expected|), within +-200."""
    error = relative_error(found, expected)
    smallest = 10 ** (-CEILING_DB / 20)
    return float(-20 * np.log10(min(max(error, smallest), 1 / smallest)))


def cosine(found: Floats, expected: Floats) -> float:
    """Cosine of the angle between two arrays; 0 where one of them is zero or not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        first, second = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        norms = float(np.linalg.norm(first) * np.linalg.norm(second))
        return float(first @ second) / norms if norms > 0 and np.isfinite(norms) else 0.0


def total_variation(first: Floats, second: Floats) -> float:
    """Half the summed difference of two answer distributions, given their logits; 0 to 1."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.abs(_softmax(first) - _softmax(second)).sum() / 2)


def _softmax(logits: Floats) -> npt.NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()
