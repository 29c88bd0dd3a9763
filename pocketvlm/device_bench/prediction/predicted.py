"""Predicted beside measured: what a prediction was worth, figure by figure."""

from __future__ import annotations

from dataclasses import fields

from pocketvlm.device_bench.prediction.roofline import Times
from pocketvlm.reports.measurement import MeasuredArm, PredictedFigure

__all__ = ["beside_measured"]


def beside_measured(times: Times, arm: MeasuredArm) -> tuple[PredictedFigure, ...]:
    """The figures that were both predicted and measured, in the order of `Times`.

    Args:
        times: What was predicted for the workload.
        arm: What was measured of it. Figures without samples are left out.
    """
    rows = []
    for item in fields(Times):
        predicted, measured = getattr(times, item.name), arm.latency.figure(item.name).median
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
