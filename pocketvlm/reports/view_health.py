"""The page's content about endurance, heat and energy: a device after its first minute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocketvlm.reports.elements import Table, numbers, words
from pocketvlm.reports.formatting import format_measured, format_share, text_of
from pocketvlm.reports.measurement import Energy, MeasuredArm, Sensors, Sustained
from pocketvlm.reports.planes import Lines, draw_lines

__all__ = ["HealthView", "view_health"]

_LEAST_POINTS = 2


@dataclass(frozen=True, kw_only=True)
class HealthView:
    """Sustained speed, temperature and energy of the arms; `None` where nothing was measured."""

    sustained: Lines | None
    sustained_table: Table | None
    temperature: Lines | None
    temperature_table: Table | None
    energy_table: Table | None


def view_health(arms: Mapping[str, MeasuredArm]) -> HealthView:
    """The blocks of all arms."""
    sustained = {name: arm.sustained for name, arm in arms.items() if arm.sustained is not None}
    sensors = {name: arm.sensors for name, arm in arms.items() if arm.sensors is not None}
    energy = {name: arm.energy for name, arm in arms.items() if arm.energy is not None}
    return HealthView(
        sustained=_draw({name: _rates(one) for name, one in sustained.items()}),
        sustained_table=_sustained_table(sustained) if sustained else None,
        temperature=_draw({name: _temperatures(one) for name, one in sensors.items()}),
        temperature_table=_sensor_table(sensors) if sensors else None,
        energy_table=_energy_table(energy) if energy else None,
    )


def _draw(series: Mapping[str, list[tuple[float, float]]]) -> Lines | None:
    shown = {name: points for name, points in series.items() if len(points) >= _LEAST_POINTS}
    return draw_lines(shown) if shown else None


def _rates(sustained: Sustained) -> list[tuple[float, float]]:
    """Decode rate by the time at which each answer ended."""
    return list(zip(sustained.at_s, sustained.decode_tok_s.samples, strict=False))


def _temperatures(sensors: Sensors) -> list[tuple[float, float]]:
    """Temperature by time; a simulated device starts every process at the same time."""
    return sorted(
        (sample.at_s, sample.temperature_c)
        for sample in sensors.samples
        if sample.at_s is not None and sample.temperature_c is not None
    )


def _sustained_table(sustained: Mapping[str, Sustained]) -> Table:
    return Table(
        caption="Continuous answers: the first and the last 10 % of the time, and what is retained",
        columns=(
            *words("Arm"),
            *numbers("Seconds", "Answers", "Burst, tokens/s", "Last 10 %, tokens/s"),
            *numbers("Decode retained", "First token retained"),
            *words("Thermal status first seen"),
        ),
        rows=tuple(
            (
                name,
                _number(one.duration_s),
                text_of(one.answers),
                _number(one.decode_tok_s.burst),
                _number(one.decode_tok_s.last),
                _share(one.decode_tok_s.retained),
                _share(one.ttft_user_ms.retained),
                "; ".join(f"{name} at {text_of(at)} s" for name, at in one.time_to_status_s.items())
                or "–",
            )
            for name, one in sustained.items()
        ),
    )


def _sensor_table(sensors: Mapping[str, Sensors]) -> Table:
    return Table(
        caption="Temperature in degrees Celsius, and thermal status from 0 (none) to 6 (shutdown)",
        columns=(
            *words("Arm"),
            *numbers("Before", "Peak", "After", "Status before", "Peak", "After"),
            *numbers("Waited, s", "Started warm"),
        ),
        rows=tuple(
            (
                name,
                *(_number(value) for value in (one.before_c, one.peak_c, one.after_c)),
                *(text_of(value) for value in (one.status_before, one.status_peak)),
                text_of(one.status_after),
                _number(one.waited_s),
                str(one.starts_warm),
            )
            for name, one in sensors.items()
        ),
    )


def _energy_table(energy: Mapping[str, Energy]) -> Table:
    return Table(
        caption="Energy of the measured answers; counters count the whole system",
        columns=(
            *words("Arm", "Counter", "What it counts"),
            *numbers("mJ per token", "J per picture", "J in all", "Answers"),
        ),
        rows=tuple(
            (
                name,
                text_of(one.counter),
                text_of(one.scope),
                *(_number(value) for value in (one.mj_per_token, one.j_per_image, one.total_j)),
                text_of(one.answers),
            )
            for name, one in energy.items()
        ),
    )


def _share(value: float | None) -> str:
    return "–" if value is None else format_share(value)


def _number(value: float | None) -> str:
    return "–" if value is None else format_measured(value)
