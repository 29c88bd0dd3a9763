"""The definition of every latency and rate of a report, from raw samples to figures.

The samples of a figure are the measured answers of all blocks of one bundle, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, median, stdev

from pocketvlm.device_bench.block import AnswerTimes, Block
from pocketvlm.machine import Samples
from pocketvlm.reports.measurement import Energy, Figure, Latency

__all__ = [
    "FIGURES",
    "paired_ratios",
    "relative_spread",
    "summarise_blocks",
    "summarise_later_turn",
    "summarise_repeats",
    "summarise_samples",
    "total_energy",
]


_LEAST_FOR_P99 = 100


def summarise_samples(values: Sequence[float]) -> Figure:
    """Samples with median, 90 %, 95 % and 99 % quantile, mean and standard deviation."""
    rounded = tuple(round(value, 4) for value in values)
    if not rounded:
        return Figure()
    return Figure(
        samples=rounded,
        median=median(rounded),
        p90=Samples(values=rounded).quantile(0.9),
        p95=Samples(values=rounded).quantile(0.95),
        p99=Samples(values=rounded).quantile(0.99) if len(rounded) >= _LEAST_FOR_P99 else None,
        mean=mean(rounded),
        sd=stdev(rounded) if len(rounded) > 1 else None,
    )


def _given(value: float | None) -> tuple[float, ...]:
    """One sample, or none if the workload has no such stage."""
    return () if value is None else (value,)


def _rate(tokens: int, span_ms: float) -> tuple[float, ...]:
    """Tokens per second; none if there was no time, or nothing in it."""
    return (tokens / span_ms * 1e3,) if tokens and span_ms else ()


FIGURES: Mapping[str, Callable[[AnswerTimes], tuple[float, ...]]] = {
    "preprocess_ms": lambda answer: _given(answer.preprocess_ms),
    "vision_ms": lambda answer: _given(answer.vision_ms),
    "tokenize_ms": lambda answer: (answer.tokenize_ms,),
    "embed_ms": lambda answer: (answer.embed_ms,),
    "prefill_ms": lambda answer: (answer.prefill_ms,),
    "decode_ms": lambda answer: answer.decode_ms,
    "sample_ms": lambda answer: answer.sample_ms,
    "detokenize_ms": lambda answer: answer.detokenize_ms,
    "ttft_user_ms": lambda answer: (answer.ttft_user_ms,),
    "ttft_engine_ms": lambda answer: (answer.ttft_engine_ms,),
    "prefill_tok_s": lambda answer: _rate(answer.prompt_tokens, answer.prefill_ms),
    "decode_tok_s": lambda answer: _rate(answer.new_tokens - 1, answer.decode_span_ms),
}
"""The samples of one answer, by the name of the figure; answers are warm."""


def summarise_blocks(blocks: Sequence[Block]) -> Latency:
    """The figures of one arm, from the blocks of its processes."""
    answers = [answer for block in blocks for answer in block.answers]
    figures = {
        "load_ms": summarise_samples([block.load_ms for block in blocks]),
        "cold_ttft_user_ms": summarise_samples([block.cold.ttft_user_ms for block in blocks]),
    }
    return Latency(figures={**figures, **_summarise_answers(answers)})


def summarise_later_turn(blocks: Sequence[Block], turn: int) -> Latency:
    """The figures of a turn after the first; `turn` counts those from 0."""
    answers = [
        answer
        for block in blocks
        if turn < len(block.later_turns)
        for answer in block.later_turns[turn]
    ]
    return Latency(figures=_summarise_answers(answers))


def _summarise_answers(answers: Sequence[AnswerTimes]) -> dict[str, Figure]:
    return {
        name: summarise_samples([value for answer in answers for value in samples_of(answer)])
        for name, samples_of in FIGURES.items()
    }


def total_energy(parts: Sequence[Energy]) -> Energy | None:
    """Energy over several processes, each figure by what it is of; `None` if nothing counted."""
    if not parts:
        return None
    return replace(
        parts[0],
        total_j=_sum([part.total_j for part in parts]),
        seconds=_sum([part.seconds for part in parts]),
        answers=sum(part.answers or 0 for part in parts),
        new_tokens=sum(part.new_tokens or 0 for part in parts),
        pictures=sum(part.pictures or 0 for part in parts),
        mj_per_token=_weighted([(part.mj_per_token, part.new_tokens) for part in parts]),
        j_per_image=_weighted([(part.j_per_image, part.pictures) for part in parts]),
        is_by_stage=all(part.is_by_stage for part in parts),
    )


def _sum(amounts: Sequence[float | None]) -> float | None:
    """The sum, if every amount is known."""
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if len(known) == len(amounts) else None


def _weighted(rows: Sequence[tuple[float | None, int | None]]) -> float | None:
    """The mean of known values, each by its count."""
    known = [(value, count) for value, count in rows if value is not None and count]
    weight = sum(count for _, count in known)
    return sum(value * count for value, count in known) / weight if weight else None


def summarise_repeats(blocks: Mapping[int, Block]) -> Latency:
    """The figures of one arm, with those of each process when left alone.

    Args:
        blocks: By number of the repeat; one may lack.
    """
    apart = {repeat: summarise_blocks([block]).figures for repeat, block in blocks.items()}
    repeats = range(max(blocks) + 1)
    return Latency(
        figures={
            name: replace(
                figure,
                by_repeat=tuple(
                    _undisturbed(name, apart[repeat][name].samples) if repeat in apart else None
                    for repeat in repeats
                ),
            )
            for name, figure in summarise_blocks(
                [blocks[repeat] for repeat in sorted(blocks)]
            ).figures.items()
        }
    )


def _undisturbed(name: str, samples: Sequence[float]) -> float | None:
    """The tenth of the samples that neighbours on the machine disturbed least."""
    if not samples:
        return None
    return Samples(values=tuple(samples)).quantile(0.9 if name.endswith("_tok_s") else 0.1)


def paired_ratios(
    arm: Mapping[int, Block], reference: Mapping[int, Block]
) -> dict[str, tuple[float, ...]]:
    """An arm divided by the reference, repeat by repeat, for every figure that both have.

    Processes are interleaved so that ratios of neighbours cancel the drift of the machine, which is
    larger than the variation within one process.

    Args:
        arm: Blocks by number of the repeat.
        reference: Likewise.
    """
    both = sorted(set(arm) & set(reference))
    ratios: dict[str, list[float]] = {}
    for repeat in both:
        first, second = summarise_blocks([arm[repeat]]), summarise_blocks([reference[repeat]])
        for name, figure in first.figures.items():
            above, below = figure.median, second.figure(name).median
            if above is not None and below:  # only one of the two may be packed
                ratios.setdefault(name, []).append(above / below)
    return {name: tuple(values) for name, values in ratios.items()}


def relative_spread(values: Sequence[float]) -> float:
    """Width of the middle 80 % of the samples, as a share of their median."""
    samples = Samples(values=tuple(values))
    return (samples.quantile(0.9) - samples.quantile(0.1)) / median(values)
