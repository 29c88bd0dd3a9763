"""What a process that died had measured: a block from the events that had arrived by then."""

from __future__ import annotations

from collections.abc import Sequence

from pocketvlm.device_bench.block import AnswerTimes, Block, SensorSample, SustainedAnswer
from pocketvlm.device_bench.protocol import AnswerEvent, Event, LoadedEvent
from pocketvlm.reports.measurement import Memory, Prompt

__all__ = ["recover_block"]


def recover_block(events: Sequence[Event]) -> Block | None:
    """The block as far as events tell it; `None` before the first answer.

    Memory, energy and the tokens are told at the end alone, and are missing. A conversation that
    broke off counts up to its last complete turn.
    """
    loads = [event for event in events if isinstance(event, LoadedEvent)]
    answers = [event for event in events if isinstance(event, AnswerEvent)]
    cold = _times(answers, "cold", 0)
    if not loads or not cold:
        return None
    turns = 1 + max(event.turn for event in answers)
    sustained = [event for event in answers if event.kind == "sustained"]
    began_ms = _began_ms(sustained[0]) if sustained else None
    return Block(
        load_ms=loads[0].load_ms,
        prompt=Prompt(tokens=cold[0].prompt_tokens),
        cold=cold[0],
        answers=_times(answers, "measured", 0),
        later_turns=tuple(_times(answers, "measured", turn) for turn in range(1, turns)),
        sustained=() if began_ms is None else _sustained(sustained, began_ms),
        sustained_at_ms=began_ms,
        sensors=tuple(event for event in events if isinstance(event, SensorSample)),
        memory=Memory(),
        token_ids=(),
        is_repeatable=True,
    )


def _times(events: Sequence[AnswerEvent], kind: str, turn: int) -> tuple[AnswerTimes, ...]:
    return tuple(event.times for event in events if event.kind == kind and event.turn == turn)


def _began_ms(first: AnswerEvent) -> float:
    """When the first turn began, by how long it took."""
    return first.at_ms - first.times.ttft_user_ms - first.times.decode_span_ms


def _sustained(events: Sequence[AnswerEvent], began_ms: float) -> tuple[SustainedAnswer, ...]:
    return tuple(
        SustainedAnswer(
            at_s=(event.at_ms - began_ms) / 1e3,
            turn=event.turn,
            ttft_user_ms=event.times.ttft_user_ms,
            prefill_ms=event.times.prefill_ms,
            decode_span_ms=event.times.decode_span_ms,
            prompt_tokens=event.times.prompt_tokens,
            new_tokens=event.times.new_tokens,
        )
        for event in events
    )
