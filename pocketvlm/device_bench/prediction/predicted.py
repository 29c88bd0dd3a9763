"""Predicted beside measured: what a prediction was worth, figure by figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from pocketvlm.device_bench.prediction.roofline import Times
from pocketvlm.reports.measurement import MeasuredArm, PredictedFigure

__all__ = ["ONNX_RUNTIME_BYTES", "RAM_FIGURE", "beside_measured"]

RAM_FIGURE = "ram_bytes"
"""The peak of a process above what it took before the bundle was opened."""

ONNX_RUNTIME_BYTES = 39_000_000
"""What ONNX Runtime takes beside weights, cache and activations of a bundle.

Measured on this package's reference models: 17 MB for its library once it is loaded, and 21 to 23
for sessions and allocators in float, int8 and int4.
"""


def beside_measured(
    arm: MeasuredArm, *, times: Times | None, ram_bytes: int | None
) -> tuple[PredictedFigure, ...]:
    """The figures that were both predicted and measured, in the order of `Times`, then memory.

    Args:
        arm: What was measured. Figures without samples are left out, and implausible ones.
        times: What was predicted for the workload; `None` where nothing was.
        ram_bytes: Likewise, of memory.
    """
    rows = (*_times(arm, times), *_memory(arm, ram_bytes))
    return tuple(row for row in rows if row.name not in arm.withheld)


def _times(arm: MeasuredArm, times: Times | None) -> Iterator[PredictedFigure]:
    for item in () if times is None else fields(Times):
        predicted, measured = getattr(times, item.name), arm.latency.figure(item.name).median
        if predicted and measured:
            yield _row(item.name, predicted, measured)


def _memory(arm: MeasuredArm, ram_bytes: int | None) -> Iterator[PredictedFigure]:
    peak, before = arm.memory.peak_rss_bytes, arm.memory.before_load_rss_bytes
    if ram_bytes and peak and before is not None and "peak_rss_bytes" not in arm.withheld:
        yield _row(RAM_FIGURE, ram_bytes, peak - before)


def _row(name: str, predicted: float, measured: float) -> PredictedFigure:
    return PredictedFigure(
        name=name, predicted=predicted, measured=measured, ratio=predicted / measured
    )
