"""Predicted beside measured: what a prediction was worth, figure by figure."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pocketvlm.device_bench.roofline import Times
from pocketvlm.reports.measurement import Latency

__all__ = ["PredictedFigure", "beside_measured"]


@dataclass(frozen=True, kw_only=True)
class PredictedFigure:
    """One figure, predicted and measured.

    Attributes:
        name: As `docs/benchmarking.md` names it, unit included.
        predicted: The prediction.
        measured: The median of the samples.
        ratio: Predicted divided by measured.
    """

    name: str
    predicted: float
    measured: float
    ratio: float


def beside_measured(times: Times, latency: Latency) -> tuple[PredictedFigure, ...]:
    """The figures that were both predicted and measured, in the order of `Times`.

    Args:
        times: What was predicted for the workload.
        latency: What was measured of it. Figures without samples are left out.
    """
    rows = []
    for item in fields(Times):
        predicted, measured = getattr(times, item.name), latency.figure(item.name).median
        if predicted and measured:
            rows.append(
                PredictedFigure(
                    name=item.name,
                    predicted=predicted,
                    measured=measured,
                    ratio=predicted / measured,
                )
            )
    return tuple(rows)
