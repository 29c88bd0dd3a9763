"""What a probe took: kept beside the rates that were fitted to it, so that a fit can be checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self

__all__ = ["ProbeTimes"]


@dataclass(frozen=True, kw_only=True)
class ProbeTimes:
    """Times of one node of a probe.

    Attributes:
        runs: How often it ran.
        fastest_s: The least.
        median_s: The median, which rates are fitted to.
    """

    runs: int
    fastest_s: float
    median_s: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Sums up samples, in seconds."""
        return cls(runs=len(samples), fastest_s=min(samples), median_s=median(samples))
