"""Reports of one device at a time: for each, its measurements and the runs that they are of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pocketvlm.reports.entries import name_device
from pocketvlm.reports.measurement import Measurement
from pocketvlm.reports.report import Report

__all__ = ["file_stem", "split_by_device"]

_LONGEST_STEM = 60


def split_by_device(reports: Sequence[Report]) -> Mapping[str, tuple[Report, ...]]:
    """The reports for a page of each device; what was timed elsewhere is left out of them."""
    devices = dict.fromkeys(
        name_device(bench.environment or report.environment)
        for report in reports
        for bench in _measured(report)
    )
    return {
        device: tuple(
            kept
            for kept in (_keep(report, device) for report in reports)
            if kept.recipe is not None or _measured(kept)
        )
        for device in devices
    }


def file_stem(device: str) -> str:
    """The device's name as a part of a file's name, on any system."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower())[:_LONGEST_STEM].strip("-") or "device"


def _measured(report: Report) -> tuple[Measurement, ...]:
    return tuple(bench for bench in (report.bench, *report.grid) if bench.arms)


def _keep(report: Report, device: str) -> Report:
    """The report with the measurements on this device alone."""
    kept = [
        bench
        for bench in _measured(report)
        if name_device(bench.environment or report.environment) == device
    ]
    first, *others = kept or [Measurement()]
    return replace(report, bench=first, grid=tuple(others))
