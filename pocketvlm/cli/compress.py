"""Commands that turn a checkpoint into something: plans, bundles, layouts of other tools."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketvlm.cli.console import (
    command_line,
    print_json,
    print_summary,
    quiet_libraries,
    say,
    uncollected,
)
from pocketvlm.cli.interrupts import unwound_interrupts
from pocketvlm.cli.options import (
    MAX_QUESTIONS,
    CalibrationOption,
    DataOption,
    JsonOption,
    ModelArgument,
    RecipeOption,
    SeedOption,
    SetOption,
    TargetOption,
    ThreadsOption,
    out_option,
)
from pocketvlm.cli.progress import show_progress
from pocketvlm.errors import CheckFailedError, InputError

if TYPE_CHECKING:
    from pocketvlm.pipeline.source_check import SourceCheckMode, SourceReport
    from pocketvlm.reports.report import Report

__all__ = ["compress", "convert", "demo", "plan", "recipes"]


def compress(
    model: ModelArgument,
    out: Annotated[Path, out_option("The run's folder.")],
    recipe: RecipeOption = "int4-balanced",
    target: TargetOption = None,
    settings: SetOption = None,
    calibration: CalibrationOption = None,
    data: DataOption = None,
    n: Annotated[int, typer.Option(min=1, max=MAX_QUESTIONS, help="Questions to score.")] = 200,
    bench: Annotated[bool, typer.Option(help="Time the bundle on this host.")] = True,
    baseline: Annotated[
        bool, typer.Option(help="Time it interleaved with the float32 ONNX export.")
    ] = True,
    verify_source: Annotated[
        bool,
        typer.Option(
            help="Compare the checkpoint with transformers' own classes before any stage."
        ),
    ] = True,
    allow_source_mismatch: Annotated[
        bool,
        typer.Option("--allow-source-mismatch", help="Continue if that fails; the report says so."),
    ] = False,
    device: Annotated[
        str,
        typer.Option(help="Where stages compute: cpu, cuda, cuda:N or mps; weights stay on disk."),
    ] = "cpu",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compress a checkpoint, export it and prove it equal.

    The result is scored and timed as well. An interrupted run resumes.
    """
    quiet_libraries()
    from pocketvlm.pipeline.job import Job
    from pocketvlm.pipeline.torchrun import join_ranks

    job = Job(
        model=model,
        recipe=recipe,
        targets=tuple(target or ()),
        settings=tuple(settings or ()),
        calibration=calibration,
        data=data,
        n=n,
        bench=bench,
        baseline=baseline,
        source_check=_source_check_mode(verify=verify_source, allow=allow_source_mismatch),
        seed=seed,
        device=device,
        threads=threads or os.cpu_count() or 1,
        command=command_line(),
    )
    with show_progress() as on_progress, join_ranks() as ranks:
        if not ranks.is_first:
            job.help_run(ranks)
            return
        result = job.run(out, ranks=ranks, on_progress=on_progress)
    print_summary(result.report)
    _print_stage_time(result.report)
    say(f"report   {result.out / 'report.html'}")
    say(f"bundle   {result.out / 'bundle'}")
    if as_json:
        print_json(result.report.document)
    if result.failures:
        raise CheckFailedError("; ".join(result.failures))


def _print_stage_time(report: Report) -> None:
    """Says how long the stages took, as `plan` predicts it."""
    seconds = sum(stage.seconds or 0.0 for stage in report.stages)
    if seconds and report.size.source_weights:
        each = seconds / 3600 / report.size.source_weights * 1e9
        say(f"stages   {seconds / 3600:.2f} h, {each:.2f} h a billion weights")


def _source_check_mode(*, verify: bool, allow: bool) -> SourceCheckMode:
    if not verify:
        return "skip"
    return "allow" if allow else "require"


def plan(
    model: ModelArgument,
    recipe: RecipeOption = "int4-balanced",
    target: TargetOption = None,
    settings: SetOption = None,
    device: Annotated[
        str | None, typer.Option(help="Check against a device of `pocketvlm devices`.")
    ] = None,
    calibration: CalibrationOption = None,
    data: DataOption = None,
    n: Annotated[int, typer.Option(min=1, max=MAX_QUESTIONS, help="Questions to score.")] = 200,
    advise: Annotated[
        bool,
        typer.Option(
            "--advise",
            help="Say which lever pays in predicted milliseconds, and what else the same compute "
            "would buy; for --device, or this host.",
        ),
    ] = False,
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="With --advise: a scored run of this model; repeat for runs that keep other "
            "numbers of visual tokens.",
        ),
    ] = None,
    verify_source: Annotated[
        bool,
        typer.Option(
            "--verify-source",
            help="Load the weights and compare the checkpoint with transformers' own classes.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a recipe against a model; predict sizes and times.

    Loads no weights, and refuses what a target cannot run.

    Rows of the folders given as --calibration and --data are checked one by one.
    """
    if measured and not advise:
        raise InputError("--measured: is for the advice; add --advise")
    quiet_libraries()
    with uncollected():
        from pocketvlm.pipeline.job import Job

        job = Job(
            model=model,
            recipe=recipe,
            targets=tuple(target or ()),
            settings=tuple(settings or ()),
            calibration=calibration,
            data=data,
            n=n,
        )
        made = job.plan(device=device, advises=advise, measured=measured or ())
    for line in made.lines():
        say(line)
    checked = _check_source(model) if verify_source else None
    if as_json:
        found = {"source_check": checked.to_json()} if checked is not None else {}
        print_json({**made.to_json(), **found})
    made.raise_if_refused()
    if checked is not None:
        checked.raise_if_failed()


def _check_source(model: str) -> SourceReport:
    """Compares a checkpoint with transformers' own classes, and says what was found."""
    from pocketvlm.pipeline.source_check import verify_folder
    from pocketvlm.pipeline.sources import resolve_model

    checked = verify_folder(resolve_model(model))
    for line in checked.lines():
        say(line)
    return checked


def convert(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A quantized checkpoint's folder.")
    ],
    layout: Annotated[str, typer.Option(help="gptq (v1), gptq_v2, compressed-tensors or vptq.")],
    out: Annotated[Path, out_option("The new folder.")],
    as_json: JsonOption = False,
) -> None:
    """Write a quantized checkpoint in the layout of another tool.

    The codes stay the same.
    """
    quiet_libraries()
    from pocketvlm.checkpoint.convert import save_layout
    from pocketvlm.pipeline.sources import load_checkpoint, resolve_model

    with unwound_interrupts():
        saved = save_layout(load_checkpoint(resolve_model(checkpoint)), out, layout=layout)
    say(f"{layout:<8} {len(saved.quantized)} layers quantized, {len(saved.dense)} float")
    say(f"size     {saved.weight_bytes / 1e6:.2f} MB")
    for note in saved.notes:
        say(f"note     {note}")
    say(f"written  {out}")
    if as_json:
        print_json(saved.to_json())


def recipes(
    name: Annotated[str | None, typer.Argument(help="The recipe to show, resolved.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, or show one."""
    quiet_libraries()
    import yaml

    from pocketvlm.recipes.load import list_recipes, load_recipe

    if name is not None:
        document = load_recipe(name).to_document()
        print(json.dumps(document) if as_json else yaml.safe_dump(document, sort_keys=False))
        return
    loaded = [load_recipe(shipped) for shipped in list_recipes()]
    for one in loaded:
        say(f"{one.name:<16} {one.description}")
    if as_json:
        print_json({"recipes": [one.to_document() for one in loaded]})


def demo(
    out: Annotated[Path, out_option("The run's folder.")] = Path("runs/demo"),
    model: Annotated[str, typer.Option(help="A reference model.")] = "reference:pocket-llava",
    as_json: JsonOption = False,
) -> None:
    """Compress a shipped model, and ask it about a picture."""
    quiet_libraries()
    from pocketvlm.pipeline.job import Job

    job = Job(model=model, command=command_line())
    with show_progress() as on_progress:
        result = job.run(out, on_progress=on_progress)
        shown = job.ask_about_a_scene(result)
    print_summary(result.report)
    say(f"picture  {shown.image}")
    say(f"asked    {shown.question}")
    say(f"answer   {shown.answer}   (expected: {shown.expected})")
    say(f"bundle   {result.out / 'bundle'}")
    say(f"report   {result.out / 'report.html'}")
    if as_json:
        print_json(result.report.document)
    if result.failures:
        raise CheckFailedError("; ".join(result.failures))
