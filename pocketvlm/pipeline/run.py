"""run: the main job. Stages, then export and certificate, then scores and timings, then report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pocketvlm.bundle import Bundle
from pocketvlm.calibration.data.sample import Sample
from pocketvlm.calibration.source import CalibrationSet
from pocketvlm.checkpoint import Checkpoint, StageRecord, read_config, read_model_folder
from pocketvlm.checkpoint.weight_files import MappedFiles, find_weight_files
from pocketvlm.context import RunContext
from pocketvlm.device_bench.arm import Pair
from pocketvlm.device_bench.controller.bench import BenchOptions, bench_bundles
from pocketvlm.device_bench.workload import Workload
from pocketvlm.errors import CalibrationError, UnsupportedError
from pocketvlm.evaluation.score import Score, score_bundle, score_checkpoint
from pocketvlm.files.full_disk import naming_faults
from pocketvlm.files.publish import replace_file
from pocketvlm.json_io import write_json
from pocketvlm.machine import return_free_memory
from pocketvlm.pipeline.assemble import build_bundle
from pocketvlm.pipeline.identity import (
    RunIdentity,
    conditions,
    stage_keys,
    stage_settings,
)
from pocketvlm.pipeline.journal import Journal
from pocketvlm.pipeline.plan import plan_stages, recipe_prefill_times
from pocketvlm.pipeline.preflight import Readers, certificate_samples, check_data, check_model
from pocketvlm.pipeline.run_report import StoredWeights, assemble_report
from pocketvlm.pipeline.shared_run import (
    beside,
    count_shared,
    note_sharing,
    require_agreement,
    stage_context,
)
from pocketvlm.pipeline.source_check import SourceCheckMode, SourceReport, check_source
from pocketvlm.pipeline.sources import load_checkpoint
from pocketvlm.recipes.load import Recipe
from pocketvlm.recipes.stages import layer_bytes_by_target
from pocketvlm.reports.html import render_card, render_html
from pocketvlm.reports.measurement import Measurement
from pocketvlm.reports.report import Report
from pocketvlm.runtime.engines import EMULATED, ENGINES, spilling_engines
from pocketvlm.stages import Stage, check_order

__all__ = ["RunResult", "compress_checkpoint", "run"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The outcome of a run.

    Attributes:
        out: The run directory.
        report: Content of its report.json; `report.document` has the JSON values.
    """

    out: Path
    report: Report

    @property
    def failures(self) -> tuple[str, ...]:
        """Checks and bounds that were not met, one line each; empty if all were."""
        return self.report.failures


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
    mapped = MappedFiles.of(find_weight_files(model, read_config(model)).files)
    checkpoint = load_checkpoint(model)
    certified, checked = _ask_first(model, checkpoint, recipe, calibration, evaluation)
    identity = RunIdentity.of(model, checkpoint, recipe, calibration, ctx.seed)
    require_agreement(ctx, identity)
    what = f"{recipe.name} of {checkpoint.source.name}"
    with naming_faults(out), Journal.open(out, identity, what) as journal:
        return _run(
            journal,
            checkpoint,
            recipe,
            calibration=calibration,
            ctx=replace(
                stage_context(ctx, model, recipe),
                prefill_times=recipe_prefill_times(recipe.stages, checkpoint.spec, recipe.targets),
            ),
            evaluation=evaluation,
            workload=workload,
            baseline=baseline,
            source_check=source_check,
            command=command,
            certified=certified,
            checked=checked,
            mapped=mapped,
        )


def _run(
    journal: Journal,
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    certified: Sequence[Sample],
    checked: Sequence[str],
    mapped: MappedFiles,
    calibration: CalibrationSet,
    ctx: RunContext,
    evaluation: CalibrationSet | None,
    workload: Workload | None,
    baseline: Callable[[], Path] | None,
    source_check: SourceCheckMode,
    command: str,
) -> RunResult:
    out = journal.out
    before = StoredWeights.of(checkpoint)
    identity = journal.identity
    keys = stage_keys(
        *(identity.model, identity.calibration, identity.seed, conditions() | beside(ctx)),
        stages=stage_settings(recipe),
    )
    _write(out / "recipe.yaml", yaml.safe_dump(recipe.to_document(), sort_keys=False))
    source = _check_source(journal, checkpoint, source_check, ctx)
    quality_float = _score_float(journal, checkpoint, evaluation, ctx)
    return_free_memory()
    checkpoint = _compress(checkpoint, recipe, calibration, journal, keys, ctx)
    mapped.hold_unchanged()
    checkpoint.save(out / "checkpoint")
    return_free_memory()
    built = build_bundle(checkpoint, recipe, recipe.targets, out / "bundle", certified, ctx)
    mapped.hold_unchanged()
    bundle = built.bundle
    compressed = (
        score_bundle(bundle, evaluation, engines=spilling_engines(out), ctx=ctx)
        if evaluation
        else None
    )
    bench = _bench(bundle, workload, baseline, ctx) if workload else None
    report = assemble_report(
        checkpoint,
        built,
        recipe,
        calibration=calibration,
        command=command,
        threads=ctx.threads,
        stages=_stage_rows(journal, keys, checkpoint.history),
        source=source,
        before=before,
        scores=(quality_float, compressed) if quality_float and compressed else None,
        bench=bench,
        notes=(*checked, *note_sharing(recipe.stages, ctx)),
    )
    write_json(out / "report.json", report.document)
    html = render_html(report)
    _write(out / "report.html", html)
    # A bundle may never hold a file that it does not list, not even for a moment.
    _write(bundle.path / "report.html", html, scratch=journal.work)
    _write(bundle.path / "README.md", render_card(report), scratch=journal.work)
    journal.log("finished", failures=list(report.failures))
    journal.clean()
    return RunResult(out=out, report=report)


def _bench(
    bundle: Bundle, workload: Workload, baseline: Callable[[], Path] | None, ctx: RunContext
) -> Measurement | None:
    """Times the bundle on every engine of this host, beside the baseline; `None` if it has none."""
    targets = {component.target for component in bundle.manifest.components}
    pairs: list[Pair] = [
        (bundle.path, name) for name in ENGINES if name in targets and name not in EMULATED
    ]
    if not pairs:
        return None
    if baseline is not None:
        pairs.insert(0, (baseline(), None))
    (bench,) = bench_bundles(
        pairs, [workload], options=BenchOptions(threads=ctx.threads), on_progress=ctx.on_progress
    )
    return bench


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
    visions = plan_stages(recipe.stages, spec, targets).each_vision()
    kept = max(vision.visual_tokens for vision in visions)
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
    shared = count_shared(recipe.stages, ctx.ranks)
    ctx.ranks.first(first)
    for index in range(first, len(keys)):
        if 0 < index < shared:
            ctx.ranks.spread_folder(journal.stage_dir(keys[index - 1]) / "checkpoint")
        folder = journal.stage_dir(keys[index])
        scratch = folder / "layers"
        scratch.mkdir(parents=True, exist_ok=True)
        stage = recipe.stages[index]
        own = ctx if stage.shares_work else ctx.alone()
        checkpoint = stage.apply(checkpoint, calibration, own.with_scratch(scratch))
        checkpoint.save(folder / "checkpoint")
        if stage.holds_model:  # until here: the next one has its weights from the file
            checkpoint = load_checkpoint(folder / "checkpoint")
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
