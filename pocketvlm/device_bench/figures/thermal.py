"""Temperature and thermal status over all processes of an arm."""

from __future__ import annotations

from collections.abc import Sequence

from pocketvlm.device_bench.schedule import Outcome
from pocketvlm.reports.measurement import Sensors, SensorSample

__all__ = ["summarise_sensors"]


def summarise_sensors(outcomes: Sequence[Outcome]) -> Sensors | None:
    """Temperature and thermal status of an arm's processes; `None` if nothing told of them."""
    samples = tuple(
        SensorSample(
            at_s=round(one.started_s + sample.at_ms / 1e3, 3),
            temperature_c=sample.temperature_c,
            thermal_status=sample.thermal_status,
        )
        for one in outcomes
        if one.block is not None
        for sample in one.block.sensors
        if sample.temperature_c is not None or sample.thermal_status is not None
    )
    waited_s = sum(one.wait.waited_s for one in outcomes)
    starts_warm = sum(not one.wait.is_cool for one in outcomes)
    if not samples and not waited_s and not starts_warm:
        return None
    degrees = [one.temperature_c for one in samples if one.temperature_c is not None]
    status = [one.thermal_status for one in samples if one.thermal_status is not None]
    return Sensors(
        before_c=degrees[0] if degrees else None,
        peak_c=max(degrees, default=None),
        after_c=degrees[-1] if degrees else None,
        status_before=status[0] if status else None,
        status_peak=max(status, default=None),
        status_after=status[-1] if status else None,
        waited_s=round(waited_s, 1),
        starts_warm=starts_warm,
        samples=samples,
    )
