"""The report of a run: every block in its place, read back as the value that pages are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint
from pocketvlm.evaluation.score import Score
from pocketvlm.files.reader import file_sha256
from pocketvlm.json_io import encode
from pocketvlm.machine import REPORT_SCHEMA, describe_environment, peak_rss_bytes
from pocketvlm.pipeline.assemble import BuiltBundle
from pocketvlm.pipeline.source_check import SourceReport
from pocketvlm.recipes.load import Expectations, Recipe
from pocketvlm.reports.measurement import MeasuredArm, MeasuredBundle, Measurement, Memory
from pocketvlm.reports.report import Report, Size
from pocketvlm.reports.report_file import parse_report
from pocketvlm.runtime.engines import EMULATED, choose_engine

__all__ = ["StoredWeights", "assemble_report"]

_BESIDE = "processor"
"""The report's name for files of a bundle that belong to no target."""


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """Weight matrices of a checkpoint.

    Attributes:
        count: Their elements.
        part_bytes: Stored bytes by part of the model.
    """

    count: int
    part_bytes: Mapping[str, int]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StoredWeights:
        """Those that a checkpoint has now."""
        part_bytes: dict[str, int] = {}
        count = 0
        for linear, form in checkpoint.forms().items():
            part_bytes[linear.part] = part_bytes.get(linear.part, 0) + form.stored_bytes
            count += linear.out_features * linear.in_features
        return cls(count=count, part_bytes=part_bytes)


def assemble_report(
    checkpoint: Checkpoint,
    built: BuiltBundle,
    recipe: Recipe,
    *,
    calibration: CalibrationSet,
    command: str,
    threads: int,
    stages: Sequence[Mapping[str, Any]],
    source: SourceReport,
    before: StoredWeights,
    scores: tuple[Score, Score] | None,
    bench: Measurement | None,
    notes: Sequence[str],
) -> Report:
    """Everything that a run found out, and which checks and bounds it does not meet.

    Args:
        checkpoint: What was exported.
        built: The bundle with its certificate.
        recipe: What was done.
        calibration: What the stages looked at.
        command: The command line.
        threads: Threads of the run.
        stages: The records of the stages.
        source: What the source check found.
        before: The source's weight matrices.
        scores: Of the checkpoint in float and of the bundle; `None` where none was measured.
        bench: What was timed; `None` where nothing was.
        notes: What was noted of the data before anything ran.
    """
    manifest = built.bundle.manifest
    arms = () if bench is None else _arms_of(built.bundle, bench)
    document: dict[str, Any] = {
        "schema": REPORT_SCHEMA,
        "command": command,
        "model": {
            "name": checkpoint.source.name,
            "family": checkpoint.spec.family,
            "sha256": checkpoint.source.sha256,
            "visual_tokens": manifest.visual_tokens,
            "visual_tokens_full": manifest.visual_tokens_full,
            "positions": manifest.positions,
        },
        "bundle": encode(_describe_bundle(built.bundle)),
        "runtimes": manifest.to_json().get("runtimes", {}),
        "recipe": {**recipe.to_document(), "sha256": recipe.sha256()},
        "calibration": calibration.describe(),
        "environment": describe_environment(threads),
        "stages": list(stages),
        "size": encode(_size(checkpoint, built.bundle, before)),
        "quality": None if scores is None else _quality(*scores),
        "source_check": source.to_json(),
        "parity": built.parity.to_json(),
        "latency": None if bench is None else {arm.runtime: encode(arm.latency) for arm in arms},
        "bench": None if bench is None else encode(bench),
        "grid": [],
        "memory": encode(
            replace(arms[0].memory if arms else Memory(), compress_peak_rss_bytes=peak_rss_bytes())
        ),
        "notes": [
            *source.run_notes(),
            *notes,
            *_notes(checkpoint, calibration, built.bundle),
            *(() if bench is None else bench.notes),
        ],
    }
    document = encode(document)  # tuples are lists in JSON
    report = parse_report(document)
    failures = (
        *(f"{name} was not exported: {reason}" for name, reason in built.failed.items()),
        *built.parity.failures(),
        *_broken_expectations(recipe.expect, report),
    )
    document["failures"] = list(failures)
    return replace(report, failures=failures, document=document)


def _describe_bundle(bundle: Bundle) -> MeasuredBundle:
    """What identifies the bundle in later measurements."""
    return MeasuredBundle(
        model=bundle.manifest.model,
        manifest_sha256=file_sha256(bundle.path / "manifest.json"),
        stored_bytes=bundle.stored_bytes(),
        visual_tokens=bundle.manifest.visual_tokens,
        visual_tokens_full=bundle.manifest.visual_tokens_full,
        kv_dtype=bundle.manifest.kv_cache.dtype,
    )


def _arms_of(bundle: Bundle, bench: Measurement) -> tuple[MeasuredArm, ...]:
    """The arms of the run's own bundle, by runtime."""
    digest = file_sha256(bundle.path / "manifest.json")
    return tuple(arm for arm in bench.arms.values() if arm.bundle.manifest_sha256 == digest)


def _size(checkpoint: Checkpoint, bundle: Bundle, before: StoredWeights) -> Size:
    parts: dict[str, int] = {}
    for name in bundle.manifest.files:
        part = name.partition("/")[0] if "/" in name else _BESIDE
        parts[part] = parts.get(part, 0) + (bundle.path / name).stat().st_size
    # An app ships one target, with the processor's files.
    beside = parts.get(_BESIDE, 0)
    largest = max(count for part, count in parts.items() if part != _BESIDE) + beside
    return Size(
        source_bytes=checkpoint.source.weight_bytes,
        bundle_bytes=bundle.stored_bytes(),
        bundle_share=largest / checkpoint.source.weight_bytes,
        parts=parts,
        weight_bytes=StoredWeights.of(checkpoint).part_bytes,
        source_weight_bytes=before.part_bytes,
        source_weights=before.count,
    )


def _quality(float_score: Score, compressed: Score) -> dict[str, Any]:
    return {
        "metric": compressed.metric,
        "n": compressed.n,
        "float": float_score.to_json(),
        "compressed": compressed.to_json(),
        "recovery": compressed.accuracy / float_score.accuracy if float_score.accuracy else None,
        "blind": float_score.blind,
    }


def _notes(checkpoint: Checkpoint, calibration: CalibrationSet, bundle: Bundle) -> list[str]:
    notes = [f"source: {note}" for note in checkpoint.source.notes]
    notes += [f"{record.method}: {note}" for record in checkpoint.history for note in record.notes]
    notes += [
        f"{component.target}: {note}"
        for component in bundle.manifest.components
        for note in component.notes
    ]
    if calibration.is_synthetic:
        notes.append(
            "calibrated on the synthetic fallback, not on pictures of your task: pass --calibration"
        )
    if checkpoint.other_vision:
        first, budget = checkpoint.vision_variant.name, checkpoint.tile_budget
        answered = (
            f"stages after them, scores and times are those of the first, {first}"
            if budget is None
            else f"scores and times are those of its tile budget ({budget.describe()}); stages "
            f"after them were calibrated with the first, {first}, for all tiles"
        )
        notes.append(f"the bundle has {len(checkpoint.other_vision) + 1} vision graphs; {answered}")
    engine = choose_engine(bundle)
    if engine in EMULATED:
        notes.append(
            "answers are from the reference evaluator, which is not Core ML, and nothing is timed: "
            "run `pocketvlm verify-coreml` on an Apple machine"
        )
    return notes


def _broken_expectations(expect: Expectations, report: Report) -> Iterator[str]:
    """Bounds of the recipe that figures of the report do not keep; what is not measured passes."""
    recovery = None if report.quality is None else report.quality.recovery
    compared = next(iter(report.bench.compared.values()), MeasuredArm())
    speedup = compared.ratios.get("decode_tok_s")
    for name, value, bound in (
        ("bundle_share", report.size.bundle_share, expect.bundle_share),
        ("recovery", recovery, expect.recovery),
        ("decode_speedup", speedup, expect.decode_speedup),
    ):
        if bound is None or value is None:
            continue
        if bound.min is not None and value < bound.min:
            yield f"{name} is {value:.3f}, expected at least {bound.min}"
        if bound.max is not None and value > bound.max:
            yield f"{name} is {value:.3f}, expected at most {bound.max}"
