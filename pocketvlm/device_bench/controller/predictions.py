"""Predictions beside what was measured, from the counts that bundles hold and a device's rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pocketvlm.bundle import Manifest
from pocketvlm.device_bench.controller.shown import ShownPicture
from pocketvlm.device_bench.devices import Device
from pocketvlm.device_bench.prediction.device_rates import rates_of
from pocketvlm.device_bench.prediction.predicted import ONNX_RUNTIME_BYTES, beside_measured
from pocketvlm.device_bench.prediction.rates import Rates
from pocketvlm.device_bench.prediction.roofline import Question, predict_times
from pocketvlm.device_bench.prediction.work import BundleWork
from pocketvlm.reports.measurement import (
    MeasuredWorkload,
    Measurement,
    Prompt,
)

__all__ = ["Predictable", "predict_beside"]

_RUNTIME = "onnx"
"""The runtime whose kernels are calibrated, and whose memory is predicted."""


@dataclass(frozen=True, kw_only=True)
class Predictable:
    """What is known of an arm before it is measured.

    Attributes:
        manifest: Of its bundle.
        work: What its graphs compute; why that is not known, where it is not.
        shown: The workload's pictures, as it sees them.
    """

    manifest: Manifest
    work: BundleWork | str
    shown: Sequence[ShownPicture]


def predict_beside(
    bench: Measurement, known: Mapping[str, Predictable], device: Device | None
) -> Measurement:
    """The measurement with predictions beside the figures of every arm of ONNX graphs.

    Args:
        bench: The measurement.
        known: What is known of every arm, by its name.
        device: What is known of the device that was measured; `None` for nothing.
    """
    rates, basis = _rates_for(bench, device)
    arms, notes = dict(bench.arms), list(bench.notes)
    for name, arm in bench.arms.items():
        if arm.runtime != _RUNTIME or arm.prompt is None or arm.latency.failed is not None:
            continue
        work = known[name].work
        if isinstance(work, str):
            notes.append(f"{name}: nothing is predicted: {work}")
            continue
        if isinstance(work.model, str):
            notes.append(f"{name}: no times are predicted: {work.model}")
        workload = bench.workload or MeasuredWorkload()
        question = _question_of(arm.prompt, workload, known[name])
        times = None
        if rates is not None and not isinstance(work.model, str):
            times = predict_times(work.model, question, rates)
        ram_bytes = _ram_bytes(work, question, workload, known[name])
        arms[name] = replace(arm, predicted=beside_measured(arm, times=times, ram_bytes=ram_bytes))
    return replace(bench, arms=arms, notes=tuple(notes), predicted_from=basis)


def _rates_for(bench: Measurement, device: Device | None) -> tuple[Rates | None, str]:
    """The rates of the device for as many threads as were measured, and what they are made from."""
    if device is None:
        return None, "no times: the device has no profile; --profile names one"
    rates, basis = rates_of(device)
    threads = None if bench.environment is None else bench.environment.threads
    if rates is None:
        return None, f"no times: {basis}"
    if threads != rates.threads:
        return None, (
            f"no times: rates are of {rates.threads} threads, and {threads} were measured ({basis})"
        )
    return rates, f"{basis}, {threads} threads"


def _question_of(prompt: Prompt, workload: MeasuredWorkload, known: Predictable) -> Question:
    """What was asked, in rows of the bundle's decoder and tiles of its vision graphs."""
    tiles = [0] * max(1, len(known.manifest.variants))
    for picture in known.shown:
        tiles[picture.vision] += picture.grid.tiles
    visual_rows = prompt.visual_tokens
    if visual_rows is None:
        visual_rows = sum(one.most_rows for one in known.shown)
    return Question(
        text_rows=max(0, (prompt.tokens or 0) - visual_rows),
        visual_rows=visual_rows,
        tiles_by_vision=tuple(tiles),
        picture_pixels=sum(picture.pixels for picture in known.shown),
        new_tokens=workload.new_tokens or 0,
        cache="int8" if known.manifest.kv_cache.dtype == "int8" else "float32",
    )


def _ram_bytes(
    work: BundleWork, question: Question, workload: MeasuredWorkload, known: Predictable
) -> int:
    """Weights, the cache of the whole conversation, the widest activations, and the runtime."""
    turns = workload.turns or 1
    text_rows = question.text_rows + (turns - 1) * (workload.prompt_tokens or 0)
    text_rows += turns * question.new_tokens
    cache_bytes = known.manifest.kv_cache.stored_bytes(text_rows, question.visual_rows)
    activations = [work.activation_bytes[picture.vision] for picture in known.shown]
    prompt_bytes = work.decoder.call_bytes(question.rows, text_rows + question.visual_rows)
    held_bytes = work.weight_bytes[_RUNTIME] + cache_bytes + max(prompt_bytes, *activations, 0)
    return held_bytes + ONNX_RUNTIME_BYTES
