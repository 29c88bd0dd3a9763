"""What is left of a device's speed after minutes of answers without a pause.

A phone's first minute says little about its thirtieth: it is compared with the last tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from pocketvlm.device_bench.block import SensorSample, SustainedAnswer
from pocketvlm.device_bench.sensors.types import THERMAL_STATUSES
from pocketvlm.reports.measurement import Retention, Sustained

__all__ = ["summarise_sustained"]

_SHARE = 0.1


def summarise_sustained(
    answers: Sequence[SustainedAnswer],
    sensors: Iterable[SensorSample] = (),
    *,
    began_ms: float = 0.0,
) -> Sustained:
    """Burst, last tenth, what is retained, and when each thermal state was reached.

    A window counts the turns that ended in it, weighted by their time; it has at least one.

    Args:
        answers: The turns, by `at_s`; of the figures, first turns alone give `ttft_user_ms`,
            because later ones reuse what the cache holds.
        sensors: Samples, of which those before `began_ms` are skipped.
        began_ms: When the first answer began, on the clock of the samples.
    """
    if not answers:
        return Sustained()
    duration_s = answers[-1].at_s
    decoding = _retention(answers, duration_s, _decode_tok_s)
    firsts = [answer for answer in answers if answer.turn == 0]
    waiting = _retention(firsts, duration_s, _ttft_user_ms)
    return Sustained(
        duration_s=duration_s,
        answers=len(firsts),
        at_s=tuple(round(answer.at_s, 3) for answer in firsts),
        decode_tok_s=Retention(
            samples=tuple(round(_decode_tok_s([answer]) or 0.0, 4) for answer in firsts),
            burst=decoding[0],
            last=decoding[1],
            retained=_ratio(decoding[1], decoding[0]),
        ),
        ttft_user_ms=Retention(
            samples=tuple(round(answer.ttft_user_ms, 4) for answer in firsts),
            burst=waiting[0],
            last=waiting[1],
            retained=_ratio(waiting[0], waiting[1]),
        ),
        time_to_status_s=_times_to_status(sensors, began_ms),
    )


_Measure = Callable[[Sequence[SustainedAnswer]], float | None]


def _retention(
    answers: Sequence[SustainedAnswer], duration_s: float, measure: _Measure
) -> tuple[float | None, float | None]:
    """A figure of the first tenth of the time and of the last."""
    early = [answer for answer in answers if answer.at_s <= duration_s * _SHARE]
    late = [answer for answer in answers if answer.at_s > duration_s * (1 - _SHARE)]
    return measure(early or answers[:1]), measure(late or answers[-1:])


def _decode_tok_s(answers: Sequence[SustainedAnswer]) -> float | None:
    span_ms = sum(answer.decode_span_ms for answer in answers)
    tokens = sum(answer.new_tokens - 1 for answer in answers)
    return tokens / span_ms * 1e3 if span_ms > 0 else None


def _ttft_user_ms(answers: Sequence[SustainedAnswer]) -> float | None:
    return sum(answer.ttft_user_ms for answer in answers) / len(answers) if answers else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _times_to_status(sensors: Iterable[SensorSample], began_ms: float) -> Mapping[str, float]:
    """Seconds until each state above none was first reached or passed, mildest first."""
    times: dict[str, float] = {}
    for sample in sensors:
        if sample.at_ms < began_ms or sample.thermal_status is None:
            continue
        for name in THERMAL_STATUSES[1 : sample.thermal_status + 1]:
            times.setdefault(name, (sample.at_ms - began_ms) / 1e3)
    return times
