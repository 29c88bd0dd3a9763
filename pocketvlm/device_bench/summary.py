"""From raw samples to figures: the definition of every latency and rate that a report prints.

A *block* is what one worker process measured (`measure.measure_block`); a figure is made of the
measured answers of all blocks of one bundle, in the order in which they were taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from pocketvlm.machine import Samples

__all__ = ["FIGURES", "paired_ratios", "relative_spread", "summarise_blocks", "summarise_samples"]

Answer = Mapping[str, Any]


def summarise_samples(values: Sequence[float]) -> dict[str, Any]:
    """Samples with median, 90 % quantile, mean and standard deviation."""
    rounded = tuple(round(value, 4) for value in values)
    return {
        **Samples(values=rounded).to_json(),
        "mean": mean(rounded) if rounded else None,
        "sd": stdev(rounded) if len(rounded) > 1 else None,
    }


def _stage(name: str) -> Callable[[Answer], list[float]]:
    """A figure that is one number an answer, or none where the workload has no such stage."""
    return lambda answer: [] if answer[name] is None else [answer[name]]


def _prefill_tok_s(answer: Answer) -> list[float]:
    return [answer["prompt_tokens"] / answer["prefill_ms"] * 1e3]


def _decode_tok_s(answer: Answer) -> list[float]:
    return [(answer["new_tokens"] - 1) / answer["decode_span_ms"] * 1e3]


FIGURES: Mapping[str, Callable[[Answer], list[float]]] = {
    "preprocess_ms": _stage("preprocess_ms"),
    "vision_ms": _stage("vision_ms"),
    "tokenize_ms": _stage("tokenize_ms"),
    "embed_ms": _stage("embed_ms"),
    "prefill_ms": _stage("prefill_ms"),
    "decode_ms": lambda answer: list(answer["decode_ms"]),
    "sample_ms": lambda answer: list(answer["sample_ms"]),
    "detokenize_ms": lambda answer: list(answer["detokenize_ms"]),
    "ttft_user_ms": _stage("ttft_user_ms"),
    "ttft_engine_ms": _stage("ttft_engine_ms"),
    "prefill_tok_s": _prefill_tok_s,
    "decode_tok_s": _decode_tok_s,
}
"""Samples that one answer contributes to every warm figure, by the figure's name."""


def summarise_blocks(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `latency` block of one bundle, from the blocks that ran."""
    answers = [answer for block in blocks for answer in block["answers"]]
    figures = {
        "load_ms": summarise_samples([block["load_ms"] for block in blocks]),
        "cold_ttft_user_ms": summarise_samples([block["cold"]["ttft_user_ms"] for block in blocks]),
    }
    # The share of loading that unpacked weights took, where the bundle holds them packed.
    expanded = [block["expand_ms"] for block in blocks if block.get("expand_ms") is not None]
    if expanded:
        figures["expand_ms"] = summarise_samples(expanded)
    for name, samples_of in FIGURES.items():
        samples = [value for answer in answers for value in samples_of(answer)]
        figures[name] = summarise_samples(samples)
    return figures


def paired_ratios(
    candidate: Mapping[int, Mapping[str, Any]], baseline: Mapping[int, Mapping[str, Any]]
) -> dict[str, list[float]]:
    """Candidate divided by baseline, repeat by repeat, for every figure that both have.

    Pairing neighbours in time cancels the drift of the machine, which is larger than the scatter
    inside one process: that is what the interleaving is for.

    Args:
        candidate: Blocks by number of the repeat.
        baseline: Likewise.
    """
    both = sorted(set(candidate) & set(baseline))
    ratios: dict[str, list[float]] = {}
    for repeat in both:
        first, second = summarise_blocks([candidate[repeat]]), summarise_blocks([baseline[repeat]])
        for name, figure in first.items():
            if name not in second:  # only one of the two is packed
                continue
            above, below = figure["median"], second[name]["median"]
            if above is not None and below:
                ratios.setdefault(name, []).append(above / below)
    return ratios


def relative_spread(values: Sequence[float]) -> float:
    """Width of the middle 80 % of the samples, as a share of their median."""
    samples = Samples(values=tuple(values))
    return (samples.quantile(0.9) - samples.quantile(0.1)) / median(values)
