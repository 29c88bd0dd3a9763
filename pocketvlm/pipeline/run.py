"""run: the main job. Stages, then export and certificate, then scores and timings, then report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.data.sample import Sample
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint, StageRecord, read_model_folder
from pocketvlm.context import RunContext
from pocketvlm.device_bench.protocol import bench_bundle
from pocketvlm.device_bench.workload import Workload
from pocketvlm.errors import CalibrationError, UnsupportedError
from pocketvlm.evaluation.score import Score, score_bundle, score_checkpoint
from pocketvlm.files.full_disk import naming_faults
from pocketvlm.files.publish import replace_file
from pocketvlm.json_io import write_json
from pocketvlm.machine import REPORT_SCHEMA, describe_environment, peak_rss_bytes
from pocketvlm.pipeline.assemble import build_bundle
from pocketvlm.pipeline.identity import (
    RunIdentity,
    conditions,
    model_sha256,
    stage_keys,
    stage_settings,
)
from pocketvlm.pipeline.journal import Journal
from pocketvlm.pipeline.plan import plan_stages
from pocketvlm.pipeline.preflight import Readers, certificate_samples, check_data, check_model
from pocketvlm.pipeline.source_check import SourceCheckMode, SourceReport, check_source
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.recipes.load import Bound, Recipe
from pocketvlm.recipes.stages import layer_bytes_by_target
from pocketvlm.reports.html import render_html, render_markdown
from pocketvlm.runtime.engines import EMULATED, choose_engine
from pocketvlm.stages import Stage, check_order

__all__ = ["RunResult", "compress_checkpoint", "run"]

_TIMED = "onnx"
"""The engine that the benchmark can time."""

_BESIDE = "processor"
"""The report's name for files of a bundle that belong to no target."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The outcome of a run.

    Attributes:
        out: The run directory.
        report: Content of its report.json.
        failures: Checks and bounds that were not met, one line each; empty if all were.
    """

    out: Path
    report: Mapping[str, Any]
    failures: tuple[str, ...]


def run(
    model: Path,
    recipe: Recipe,
    *,
    out: Path,
    calibration: CalibrationSet,
    ctx: RunContext,
    evaluation: CalibrationSet | None = None,
    workload: Workload | None = None,
    baseline: Callable[[], Path] | None = None,
    source_check: SourceCheckMode = "require",
    command: str = "",
) -> RunResult:
    """Compresses a model, exports it, certifies the result, scores and times it.

    The same call resumes a run that was killed: at the first unfinished layer of the first
    unfinished stage, with byte-identical checkpoint and bundle. Whatever was damaged in between is
    done again.

    Args:
        model: A checkpoint directory.
        recipe: The recipe.
        out: The run directory.
        calibration: The calibration set of the stages.
        ctx: Seed, threads, progress.
        evaluation: The questions to score; `None` leaves quality unmeasured.
        workload: The workload to time; `None` leaves latency unmeasured.
        baseline: Makes a bundle that is timed in the same interleaved run; called last.
        source_check: Whether a checkpoint that is read differently than by stock transformers is an
            error (`require`), a note (`allow`), or not checked (`skip`).
        command: The command line, for the report.

    Raises:
        SourceMismatchError: A required source check failed; no stage has run.
        PocketVLMError: The input is wrong, another process writes the folder, or the disk is full;
            nothing that was there before is lost.
    """
    Journal.refuse_if_busy(out)
    checkpoint = load_checkpoint(model)
    certified, checked = _ask_first(model, checkpoint, recipe, calibration, evaluation)
    identity = RunIdentity(
        model=model_sha256(model, checkpoint.source.sha256),
        weights=checkpoint.source.sha256,
        recipe=recipe.sha256(),
        calibration=calibration.sha256,
        seed=ctx.seed,
    )
    what = f"{recipe.name} of {checkpoint.source.name}"
    with naming_faults(out), Journal.open(out, identity, what) as journal:
        return _run(
            journal,
            checkpoint,
            recipe,
            calibration=calibration,
            ctx=replace(ctx, source_dir=model, layer_bytes=layer_bytes_by_target(recipe.targets)),
            evaluation=evaluation,
            workload=workload,
            baseline=baseline,
            source_check=source_check,
            command=command,
            certified=certified,
            checked=checked,
        )


def _run(
    journal: Journal,
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    certified: Sequence[Sample],
    checked: Sequence[str],
    calibration: CalibrationSet,
    ctx: RunContext,
    evaluation: CalibrationSet | None,
    workload: Workload | None,
    baseline: Callable[[], Path] | None,
    source_check: SourceCheckMode,
    command: str,
) -> RunResult:
    out = journal.out
    source_parts = _weight_bytes(checkpoint)
    identity = journal.identity
    keys = stage_keys(
        *(identity.model, identity.calibration, identity.seed, conditions()),
        stages=stage_settings(recipe),
    )
    _write(out / "recipe.yaml", yaml.safe_dump(recipe.to_document(), sort_keys=False))
    source = _check_source(journal, checkpoint, source_check, ctx)
    quality_float = _score_float(journal, checkpoint, evaluation, ctx)
    checkpoint = _compress(checkpoint, recipe, calibration, journal, keys, ctx)
    checkpoint.save(out / "checkpoint")
    built = build_bundle(checkpoint, recipe, recipe.targets, out / "bundle", certified, ctx)
    bundle, parity = built.bundle, built.parity
    compressed = score_bundle(bundle, evaluation, ctx=ctx) if evaluation else None
    is_timed = choose_engine(bundle) == _TIMED
    bench = (
        bench_bundle(
            bundle.path,
            workload,
            baseline=baseline() if baseline else None,
            threads=ctx.threads,
            on_progress=ctx.on_progress,
        )
        if workload and is_timed
        else None
    )
    report = {
        "schema": REPORT_SCHEMA,
        "command": command,
        "model": {
            "name": checkpoint.source.name,
            "family": checkpoint.spec.family,
            "sha256": checkpoint.source.sha256,
            "visual_tokens": bundle.manifest.visual_tokens,
            "visual_tokens_full": bundle.manifest.visual_tokens_full,
            "positions": bundle.manifest.positions,
        },
        "runtimes": bundle.manifest.to_json().get("runtimes", {}),
        "recipe": {**recipe.to_document(), "sha256": recipe.sha256()},
        "calibration": calibration.describe(),
        "environment": describe_environment(ctx.threads),
        "stages": _stage_rows(journal, keys, checkpoint.history),
        "size": _sizes(checkpoint, bundle, source_parts),
        "quality": _quality(quality_float, compressed),
        "source_check": source.to_json(),
        "parity": parity.to_json(),
        "latency": bench["latency"] if bench else None,
        "bench": bench,
        "memory": {
            **(bench["memory"] if bench else {}),
            "compress_peak_rss_bytes": peak_rss_bytes(),
        },
        "notes": [
            *source.run_notes(),
            *checked,
            *_notes(checkpoint, calibration, bundle, bench),
        ],
    }
    unexported = (f"{name} was not exported: {reason}" for name, reason in built.failed.items())
    failures = (*unexported, *parity.failures(), *_broken_expectations(recipe, report))
    report["failures"] = list(failures)
    write_json(out / "report.json", report)
    html = render_html(report)
    _write(out / "report.html", html)
    # A bundle may never hold a file that it does not list, not even for a moment.
    _write(bundle.path / "report.html", html, scratch=journal.work)
    _write(bundle.path / "README.md", render_markdown(report), scratch=journal.work)
    journal.log("finished", failures=list(failures))
    journal.clean()
    return RunResult(out=out, report=report, failures=failures)


def _write(path: Path, text: str, *, scratch: Path | None = None) -> None:
    with replace_file(path, scratch=scratch) as aside:
        aside.write_text(text, encoding="utf-8")


def _ask_first(
    model: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: CalibrationSet,
    evaluation: CalibrationSet | None,
) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """Refuses what the runtime would refuse; returns the certificate's questions, and notes.

    Raises:
        UnsupportedError: The runtime cannot read the model.
        CalibrationError: A row of the data cannot be used.
    """
    spec, targets = checkpoint.spec, recipe.targets
    kept = plan_stages(recipe.stages, spec, targets).visual_tokens
    readers = Readers.open(model, spec)
    found = check_model(readers, model)
    found.raise_if_any(UnsupportedError)
    rows = check_data(readers, targets, kept=kept, calibration=calibration, evaluation=evaluation)
    rows.raise_if_any(CalibrationError)
    certified, chosen = certificate_samples(
        readers, targets, kept=kept, calibration=calibration, evaluation=evaluation
    )
    return certified, (*found.notes, *rows.notes, *chosen.notes)


def compress_checkpoint(
    checkpoint: Checkpoint, stages: Sequence[Stage], calibration: CalibrationSet, ctx: RunContext
) -> Checkpoint:
    """Applies stages one after another, in memory; a shortcut of the Python API.

    Raises:
        RecipeError: A stage is in the wrong position.
    """
    check_order(stages)
    ctx = replace(ctx, layer_bytes={**layer_bytes_by_target(()), **ctx.layer_bytes})
    for stage in stages:
        checkpoint = stage.apply(checkpoint, calibration, ctx)
    return checkpoint


def _compress(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: CalibrationSet,
    journal: Journal,
    keys: Sequence[str],
    ctx: RunContext,
) -> Checkpoint:
    """Runs the stages that earlier attempts have not finished."""
    first = 0
    for index in reversed(range(len(keys))):
        finished = journal.finished_checkpoint(keys[index])
        if finished is not None:
            checkpoint, first = load_checkpoint(finished), index + 1
            journal.log("resumed", stage=index)
            break
    for index in range(first, len(keys)):
        folder = journal.stage_dir(keys[index])
        scratch = folder / "layers"
        scratch.mkdir(parents=True, exist_ok=True)
        checkpoint = recipe.stages[index].apply(checkpoint, calibration, ctx.with_scratch(scratch))
        checkpoint.save(folder / "checkpoint")
        journal.finish_stage(keys[index], asdict(checkpoint.history[-1]))
    return checkpoint


def _check_source(
    journal: Journal, checkpoint: Checkpoint, mode: SourceCheckMode, ctx: RunContext
) -> SourceReport:
    """Compares the checkpoint with the stock classes, or reads what an earlier attempt found."""
    if mode == "skip" or ctx.source_dir is None:
        return SourceReport(verdict="skipped", reason="--no-verify-source")
    (key,) = stage_keys(journal.identity.model, conditions(), stages=["source_check"])
    known = journal.find("source_check", key)
    if known is not None:
        report = SourceReport.from_json(known)
    else:
        ctx.report("source check", 0, 1)
        report = check_source(checkpoint, read_model_folder(ctx.source_dir))
        ctx.report("source check", 1, 1)
        if report.verdict != "not verified":  # what is missing may be there next time
            journal.keep("source_check", key, report.to_json())
    journal.log("source_check", verdict=report.verdict)
    if mode == "require":
        report.raise_if_failed()
    return report


def _score_float(
    journal: Journal, checkpoint: Checkpoint, evaluation: CalibrationSet | None, ctx: RunContext
) -> Score | None:
    if evaluation is None:
        return None
    (key,) = stage_keys(evaluation.sha256, conditions(), stages=["quality"])
    known = journal.find("quality_float", key)
    if known is not None:
        return Score.from_json(known)
    score = score_checkpoint(checkpoint, evaluation, ctx=ctx)
    journal.keep("quality_float", key, score.to_json())
    journal.log("quality_float", evaluation=evaluation.sha256, score=score.to_json())
    return score


def _stage_rows(
    journal: Journal, keys: Sequence[str], history: Sequence[StageRecord]
) -> list[dict[str, Any]]:
    """Records with the timings of the attempt that ran them."""
    return [
        dict(journal.stage_record(key) or asdict(record))
        for key, record in zip(keys, history[len(history) - len(keys) :], strict=True)
    ]


def _weight_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Stored bytes of the weight matrices by part."""
    weights: dict[str, int] = {}
    for linear, form in checkpoint.forms().items():
        weights[linear.part] = weights.get(linear.part, 0) + form.stored_bytes
    return weights


def _sizes(
    checkpoint: Checkpoint, bundle: Bundle, source_parts: Mapping[str, int]
) -> dict[str, Any]:
    parts: dict[str, int] = {}
    for name in bundle.manifest.files:
        part = name.partition("/")[0] if "/" in name else _BESIDE
        parts[part] = parts.get(part, 0) + (bundle.path / name).stat().st_size
    # An app ships one target, with the processor's files.
    beside = parts.get(_BESIDE, 0)
    largest = max(count for part, count in parts.items() if part != _BESIDE) + beside
    return {
        "source_bytes": checkpoint.source.weight_bytes,
        "bundle_bytes": bundle.stored_bytes(),
        "bundle_share": largest / checkpoint.source.weight_bytes,
        "parts": parts,
        "weight_bytes": _weight_bytes(checkpoint),
        "source_weight_bytes": dict(source_parts),
    }


def _quality(float_score: Score | None, compressed: Score | None) -> dict[str, Any] | None:
    if float_score is None or compressed is None:
        return None
    return {
        "metric": compressed.metric,
        "n": compressed.n,
        "float": float_score.to_json(),
        "compressed": compressed.to_json(),
        "recovery": compressed.accuracy / float_score.accuracy if float_score.accuracy else None,
        "blind": float_score.blind,
    }


def _notes(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    bundle: Bundle,
    bench: Mapping[str, Any] | None,
) -> list[str]:
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
    engine = choose_engine(bundle)
    if engine != _TIMED and engine not in EMULATED:
        notes.append(f"nothing is timed: the benchmark times {_TIMED}, and the bundle has {engine}")
    if engine in EMULATED:
        notes.append(
            "answers are from the reference evaluator, which is not Core ML, and nothing is timed: "
            "run `pocketvlm verify-coreml` on an Apple machine"
        )
    return [*notes, *(bench["notes"] if bench else ())]


def _broken_expectations(recipe: Recipe, report: Mapping[str, Any]) -> list[str]:
    quality, bench = report["quality"], report["bench"]
    measured = {
        "bundle_share": report["size"]["bundle_share"],
        "recovery": quality["recovery"] if quality else None,
        "decode_speedup": (bench or {}).get("ratios", {}).get("decode_tok_s"),
    }
    broken = []
    for name, value in measured.items():
        bound: Bound | None = getattr(recipe.expect, name)
        if bound is None or value is None:
            continue
        if bound.min is not None and value < bound.min:
            broken.append(f"{name} is {value:.3f}, expected at least {bound.min}")
        if bound.max is not None and value > bound.max:
            broken.append(f"{name} is {value:.3f}, expected at most {bound.max}")
    return broken
