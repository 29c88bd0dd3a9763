"""What is left of a device's speed after minutes of answers without a pause.

A phone's first minute says little about its thirtieth: it is compared with the last tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pocketvlm.device_bench.block import Block, SustainedAnswer
from pocketvlm.device_bench.runner.sensors.types import THERMAL_STATUSES
from pocketvlm.reports.measurement import Retention, Sustained

__all__ = ["summarise_sustained"]

_SHARE = 0.1

Figure = Callable[[Sequence[SustainedAnswer]], float]
"""A figure of some answers."""


def summarise_sustained(block: Block) -> Sustained | None:
    """Burst, last tenth, what is retained, and when each thermal state was reached.

    A window counts the turns that ended in it, of decoding weighted by their time; it has at least
    one. Only first turns have a time to first token, because later ones reuse what the cache holds.

    Returns:
        `None` if the process did not answer without a pause.
    """
    answers = block.sustained
    firsts = [answer for answer in answers if answer.turn == 0]
    if not firsts:
        return None
    duration_s = answers[-1].at_s
    return Sustained(
        duration_s=round(duration_s, 3),
        answers=len(firsts),
        at_s=tuple(round(answer.at_s, 3) for answer in firsts),
        decode_tok_s=_retention(firsts, duration_s, _decode_tok_s, is_rate=True),
        ttft_user_ms=_retention(firsts, duration_s, _ttft_user_ms, is_rate=False),
        time_to_status_s=_times_to_status(block),
    )


def _retention(
    answers: Sequence[SustainedAnswer], duration_s: float, figure: Figure, *, is_rate: bool
) -> Retention:
    early = [answer for answer in answers if answer.at_s <= duration_s * _SHARE]
    late = [answer for answer in answers if answer.at_s > duration_s * (1 - _SHARE)]
    burst, last = figure(early or answers[:1]), figure(late or answers[-1:])
    above, below = (last, burst) if is_rate else (burst, last)
    return Retention(
        samples=tuple(round(figure([answer]), 4) for answer in answers),
        burst=burst,
        last=last,
        retained=above / below if below else None,
    )


def _decode_tok_s(answers: Sequence[SustainedAnswer]) -> float:
    span_ms = sum(answer.decode_span_ms for answer in answers)
    tokens = sum(answer.new_tokens - 1 for answer in answers)
    return tokens / span_ms * 1e3 if span_ms > 0 else 0.0


def _ttft_user_ms(answers: Sequence[SustainedAnswer]) -> float:
    return sum(answer.ttft_user_ms for answer in answers) / len(answers)


def _times_to_status(block: Block) -> Mapping[str, float]:
    """Seconds from the first answer until each state above none was reached or passed."""
    began_ms = block.sustained_at_ms or 0.0
    times: dict[str, float] = {}
    for sample in block.sensors:
        if sample.at_ms < began_ms or sample.thermal_status is None:
            continue
        for name in THERMAL_STATUSES[1 : sample.thermal_status + 1]:
            times.setdefault(name, round((sample.at_ms - began_ms) / 1e3, 3))
    return times
