"""The content of a page, computed from its reports; the template draws it.

A block that is missing becomes "not measured", and the notes of all blocks are collected in one
place. One run is shown whole; several are put side by side first, then measured device by device,
and each of them is folded away at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocketvlm.reports.entries import join_reports
from pocketvlm.reports.report import Report
from pocketvlm.reports.view_measurement import MeasurementView, view_measurement
from pocketvlm.reports.view_overview import Overview, view_overview
from pocketvlm.reports.view_run import RunView, view_run

__all__ = ["DeviceView", "PageView", "view_page"]


@dataclass(frozen=True, kw_only=True)
class DeviceView:
    """One device with everything that was measured on it."""

    name: str
    measurements: tuple[MeasurementView, ...]


@dataclass(frozen=True, kw_only=True)
class PageView:
    """A page: one run by itself, or an overview, devices, and all runs."""

    title: str
    overview: Overview | None
    devices: tuple[DeviceView, ...]
    runs: tuple[RunView, ...]


def view_page(reports: Sequence[Report]) -> PageView:
    """Computes the content of the page of one or several reports."""
    overview = view_overview(join_reports(reports))
    if len(reports) == 1 and (overview is None or _is_run(reports[0])):
        run = view_run(reports[0])
        return PageView(title=run.title, overview=None, devices=(), runs=(run,))
    measured = [
        view
        for view in (
            view_measurement(bench, report.environment)
            for report in reports
            for bench in (report.bench, *report.grid)
        )
        if view is not None
    ]
    return PageView(
        title=overview.title if overview is not None else "",
        overview=overview,
        devices=tuple(
            DeviceView(
                name=name, measurements=tuple(view for view in measured if view.device == name)
            )
            for name in dict.fromkeys(view.device for view in measured)
        ),
        runs=tuple(view_run(report) for report in reports if _is_run(report)),
    )


def _is_run(report: Report) -> bool:
    """Whether a report is of a run, and not of a measurement alone."""
    return bool(report.recipe or report.stages or report.quality or report.size.bundle_bytes)
