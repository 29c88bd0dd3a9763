"""How much slower is B than A, with an interval: bootstrap over processes.

The unit is a process: its answers share its luck (the core it was put on, the neighbours that it
had), and counting them one by one would claim a precision that is not there. Pairs of interleaved
processes share the minute as well, and their ratio cancels its drift; the processes of two separate
runs do not, so they are resampled apart, and the interval lacks whatever changed between the runs.

Everything is computed on logarithms, where a median is robust against the heavy tail of a busy
machine, and where the ratio of A to B is the negative of that of B to A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["LEAST_PROCESSES", "Interval", "interval_of_pairs", "interval_of_samples"]

LEAST_PROCESSES = 5
"""With fewer, not even agreement of all of them is evidence at the level of the interval."""

_RESAMPLES = 10_000
# A gate looks at several figures: one in a hundred may lie beyond an end of its interval by chance.
_CONFIDENCE = 0.98
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A ratio of B to A and its 98 % bootstrap interval.

    Attributes:
        low: The lower end.
        ratio: The estimate.
        high: The upper end.
        processes: Pairs, or processes of the smaller sample, that it is made from.
        is_paired: Whether they were interleaved.
    """

    low: float
    ratio: float
    high: float
    processes: int
    is_paired: bool


def interval_of_pairs(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The median ratio of interleaved processes, resampled pair by pair.

    Args:
        first: A figure of A above zero, one value per process.
        second: That of B, in the order of the same repeats.

    Raises:
        ValueError: They are not equally many, are fewer than `LEAST_PROCESSES`, or not above zero.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} processes do not make pairs")
    logs = _logarithms(second) - _logarithms(first)
    return _interval(
        float(np.median(logs)), _resampled_medians(logs, 0), processes=len(logs), is_paired=True
    )


def interval_of_samples(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The ratio of the medians of two separate runs, each resampled by itself.

    Args:
        first: A figure of A above zero, one value per process.
        second: That of B.

    Raises:
        ValueError: One of them has fewer than `LEAST_PROCESSES`, or a value not above zero.
    """
    ours, theirs = _logarithms(first), _logarithms(second)
    return _interval(
        float(np.median(theirs) - np.median(ours)),
        _resampled_medians(theirs, 0) - _resampled_medians(ours, 1),
        processes=min(len(ours), len(theirs)),
        is_paired=False,
    )


def _logarithms(values: Sequence[float]) -> npt.NDArray[np.float64]:
    if len(values) < LEAST_PROCESSES:
        raise ValueError(f"{len(values)} processes; an interval needs {LEAST_PROCESSES}")
    array = np.asarray(values, dtype=np.float64)
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError("an interval of ratios needs values above zero")
    return np.log(array)


def _resampled_medians(values: npt.NDArray[np.float64], stream: int) -> npt.NDArray[np.float64]:
    """Medians of resamples; the two samples of a comparison have different streams."""
    random = np.random.default_rng((_SEED, stream))
    chosen = random.integers(0, len(values), (_RESAMPLES, len(values)))
    medians: npt.NDArray[np.float64] = np.median(values[chosen], axis=1)
    return medians


def _interval(
    point: float, resampled: npt.NDArray[np.float64], *, processes: int, is_paired: bool
) -> Interval:
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.exp(np.quantile(resampled, (tail, 1 - tail)))
    return Interval(
        low=float(low),
        ratio=float(np.exp(point)),
        high=float(high),
        processes=processes,
        is_paired=is_paired,
    )
