"""The command line: parse, call the API, print. The only place that prints and draws progress.

Human text goes to stderr; `--json` puts one JSON document on stdout. Exit codes: 0 done, 1 a check
or bound failed, 2 the input was wrong, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketvlm import __version__
from pocketvlm.errors import CheckFailedError, PocketVLMError

if TYPE_CHECKING:
    from pocketvlm.context import Progress, ProgressCallback

__all__ = ["app", "main"]

app = typer.Typer(
    name="pocketvlm",
    help="Turn a vision-language checkpoint into a phone-ready artifact that can be trusted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local directory, a hub id, reference:pocket-llava, reference:pocket-smol, or "
        "shape:smolvlm-256m (random weights, for speed alone).",
    ),
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        help="The checkpoint that the bundle was made from. Default: the one beside the bundle."
    ),
]
QuestionsOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A folder of pictures and questions, or reference:SEED. Default: generated ones.",
    ),
]
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="A shipped recipe's name, or a YAML file.")
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option("--target", help="Export format; repeat for several. Default: the recipe's."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Changes the recipe, e.g. stages.0.keep=0.25."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads. Default: all cores.")
]
RuntimeOption = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        help="onnx, executorch, or coreml: the reference evaluator. Default: what the bundle has.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]


def main() -> None:
    """Entry point: maps failures to one line and an exit code."""
    try:
        code = app(standalone_mode=False)
    except PocketVLMError as error:
        code = _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        code = _show_usage(error)
    except (typer.Abort, KeyboardInterrupt):
        code = _interrupted()
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        code = _fail(f"{where}{error.strerror}; nothing that was there before is lost", 2)
    sys.exit(code if isinstance(code, int) else 0)


_STORAGE_ERRORS = (
    errno.ENOSPC,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.EISDIR,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def compress(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")],
    recipe: RecipeOption = "int4-balanced",
    target: TargetOption = None,
    settings: SetOption = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A folder of pictures and questions, `reference` or `synthetic`. Default: the "
            "recipe's."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Questions to score: a folder, reference:SEED, or none. Default: reference:1 for "
            "a reference model, else none."
        ),
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Questions to score.")] = 200,
    bench: Annotated[bool, typer.Option(help="Time the bundle on this host.")] = True,
    baseline: Annotated[
        bool, typer.Option(help="Time it interleaved with the float32 ONNX export.")
    ] = True,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compress a checkpoint, export it, prove it equal, score and time it. Resumable."""
    _quiet_libraries()
    from pocketvlm.pipeline.job import Job

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
        seed=seed,
        threads=threads or os.cpu_count() or 1,
        command=_command_line(),
    )
    with _progress() as on_progress:
        result = job.run(out, on_progress=on_progress)
    _print_summary(result.report)
    _say(f"report   {result.out / 'report.html'}")
    _say(f"bundle   {result.out / 'bundle'}")
    if as_json:
        _print_json(result.report)
    if result.failures:
        raise CheckFailedError("; ".join(result.failures))


@app.command()
def plan(
    model: ModelArgument,
    recipe: RecipeOption = "int4-balanced",
    target: TargetOption = None,
    settings: SetOption = None,
    device: Annotated[
        str | None, typer.Option(help="Check against a device of `pocketvlm devices`.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Validate a recipe, refuse what a target cannot run, predict sizes. Loads no weights."""
    _quiet_libraries()
    from pocketvlm.pipeline.plan import plan as make_plan
    from pocketvlm.pipeline.sources import resolve_model, select_targets
    from pocketvlm.recipes.load import load_recipe

    loaded = select_targets(load_recipe(recipe, settings or ()), target or ())
    made = make_plan(resolve_model(model), loaded, device=device)
    for line in made.lines():
        _say(line)
    if as_json:
        _print_json(made.to_json())
    made.raise_if_refused()


@app.command()
def ask(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")],
    image: Annotated[Path | None, typer.Option("--image", "-i", help="A picture.")] = None,
    runtime: RuntimeOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about a picture from the bundle alone, streamed.

    With --runtime executorch, the answer is that of ExecuTorch's own MultimodalRunner; with --json
    besides, which tells token ids and timings, that of the loop which ONNX Runtime is driven by.
    """
    from dataclasses import asdict

    from pocketvlm.bundle import Bundle
    from pocketvlm.runtime.conversation import Conversation
    from pocketvlm.runtime.engines import choose_engine, open_engine
    from pocketvlm.runtime.executorch.answer import answer_once

    def show(piece: str) -> None:
        if not as_json:
            print(piece, end="", flush=True)

    opened = Bundle.open(bundle)
    if choose_engine(opened, runtime) == "executorch" and not as_json:
        answer_once(
            opened,
            prompt,
            image,
            max_new_tokens=max_new_tokens,
            threads=threads,
            on_token=show,
        )
        print()
        return
    conversation = Conversation(opened, runner=open_engine(opened, runtime, threads=threads))

    answer = conversation.ask(prompt, image=image, max_new_tokens=max_new_tokens, on_token=show)
    if as_json:
        _print_json(
            {
                "text": answer.text,
                "token_ids": list(answer.token_ids),
                "timings": asdict(answer.timings),
            }
        )
    else:
        print()


@app.command(name="eval")
def evaluate(
    subject: Annotated[
        str, typer.Argument(metavar="CHECKPOINT_OR_BUNDLE", help="What answers the questions.")
    ],
    data: Annotated[
        str, typer.Option(help="A folder of pictures and questions, or reference:SEED.")
    ] = "reference:1",
    n: Annotated[int, typer.Option(min=1, help="Questions.")] = 500,
    arithmetic: Annotated[
        str, typer.Option(help="Round a checkpoint's activations as onnx or executorch does.")
    ] = "float32",
    runtime: RuntimeOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score generated answers, with a 95 % interval and the blind floor."""
    _quiet_libraries()
    from pocketvlm.context import RunContext
    from pocketvlm.pipeline.sources import load_evaluation, score_subject

    samples = load_evaluation(data, n)
    with _progress() as on_progress:
        ctx = RunContext(threads=threads or os.cpu_count() or 1, on_progress=on_progress)
        score = score_subject(subject, samples, ctx, arithmetic, runtime)
    document = score.to_json()
    _say(
        f"{document['metric']}  {score.accuracy:.1%}  "
        f"[{score.interval_low:.1%}, {score.interval_high:.1%}]  n={score.n}"
    )
    for kind, row in score.per_kind.items():
        _say(f"  {kind:<10} {row.accuracy:.1%}  n={row.n}")
    if score.blind is not None:
        _say(f"blind floor  {score.blind:.1%}")
    if as_json:
        _print_json(document)


@app.command()
def bench(
    bundle: BundleArgument,
    baseline: Annotated[
        Path | None, typer.Option(help="A bundle that is timed in the same interleaved run.")
    ] = None,
    workload: Annotated[str, typer.Option(help="vlm, text or short.")] = "short",
    device: Annotated[str, typer.Option(help="Where it runs.")] = "host",
    repeats: Annotated[int | None, typer.Option(min=5, help="Repeats, at least 5.")] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time a bundle: stages, two times to first token, rates, memory; raw samples kept."""
    from dataclasses import replace

    from pocketvlm.device_bench.protocol import bench_bundle
    from pocketvlm.device_bench.workload import load_workload

    chosen = load_workload(workload)
    if repeats is not None:
        chosen = replace(chosen, repeats=repeats)
    with _progress() as on_progress:
        result = bench_bundle(
            bundle,
            chosen,
            baseline=baseline,
            device=device,
            threads=threads,
            on_progress=on_progress,
        )
    _print_latency(result)
    if as_json:
        _print_json(result)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A report.json, or its folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The one that must not be worse.")],
    max_regress: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=SHARE", help="Allowed regression, e.g. decode_tok_s=0.05."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Exit with 1 when B is worse than A beyond the bound."""
    from pocketvlm.device_bench.compare import compare_reports, parse_bounds

    rows = compare_reports(first, second, parse_bounds(max_regress or ()))
    for row in rows:
        _say(row.line())
    if as_json:
        _print_json({"rows": [row.to_json() for row in rows]})
    worse = [row.metric for row in rows if not row.passed]
    if worse:
        raise CheckFailedError(f"worse than {first} beyond the bound: {', '.join(worse)}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from pocketvlm.device_bench.html import render_html
    from pocketvlm.report import read_json

    documents = [read_json(run / "report.json" if run.is_dir() else run) for run in runs]
    out.write_text(render_html(*documents), encoding="utf-8")
    _say(f"report   {out}")


@app.command()
def convert(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A quantized checkpoint's folder.")
    ],
    layout: Annotated[str, typer.Option(help="gptq (v1), gptq_v2 or vptq.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder.")],
    as_json: JsonOption = False,
) -> None:
    """Write a quantized checkpoint in a layout that other tools read, with the same codes."""
    _quiet_libraries()
    from pocketvlm.pipeline.sources import load_checkpoint, resolve_model
    from pocketvlm.save_layout import save_layout

    saved = save_layout(load_checkpoint(resolve_model(checkpoint)), out, layout=layout)
    _say(f"{layout:<8} {len(saved.quantized)} layers quantized, {len(saved.dense)} float")
    _say(f"size     {saved.weight_bytes / 1e6:.2f} MB")
    for note in saved.notes:
        _say(f"note     {note}")
    _say(f"written  {out}")
    if as_json:
        _print_json(saved.to_json())


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this one, resolved.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, or show one."""
    _quiet_libraries()
    import yaml

    from pocketvlm.recipes.load import list_recipes, load_recipe

    if name is not None:
        document = load_recipe(name).to_document()
        print(json.dumps(document) if as_json else yaml.safe_dump(document, sort_keys=False))
        return
    loaded = [load_recipe(shipped) for shipped in list_recipes()]
    for one in loaded:
        _say(f"{one.name:<16} {one.description}")
    if as_json:
        _print_json({"recipes": [one.to_document() for one in loaded]})


@app.command()
def devices(as_json: JsonOption = False) -> None:
    """List device profiles."""
    from dataclasses import asdict

    from pocketvlm.device_bench.devices import list_devices

    profiles = list_devices()
    for profile in profiles:
        _say(f"{profile.name:<16} {profile.description}")
    if as_json:
        _print_json({"devices": [asdict(profile) for profile in profiles]})


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say whether the installed versions fit together, and what is missing for which target."""
    from pocketvlm.pipeline.doctor import examine

    findings = examine()
    for finding in findings:
        _say(finding.line())
    if as_json:
        _print_json({"findings": [finding.to_json() for finding in findings]})
    broken = [finding.name for finding in findings if finding.verdict == "broken"]
    if broken:
        raise CheckFailedError(f"these do not fit: {', '.join(broken)}")


@app.command()
def inspect(
    bundle: BundleArgument,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Compute the Core ML packages with the reference evaluator (which is not Core ML) "
            "and compare them with the checkpoint.",
        ),
    ] = False,
    swift: Annotated[
        bool, typer.Option("--swift", help="Print a Swift file that answers from the bundle.")
    ] = False,
    checkpoint: CheckpointOption = None,
    data: QuestionsOption = None,
    n: Annotated[int, typer.Option(min=1, help="Questions for --evaluate.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens that are compared.")] = 16,
    as_json: JsonOption = False,
) -> None:
    """Say what a bundle holds, after checking the digest of every file."""
    from pocketvlm.bundle import Bundle

    opened = Bundle.open(bundle)
    if swift:
        from pocketvlm.export.coreml.swift import render_swift

        print(render_swift(opened), end="")
        return
    if evaluate:
        _quiet_libraries()
        from pocketvlm.context import RunContext
        from pocketvlm.pipeline.verify_coreml import Questions, evaluate_coreml

        asked = Questions(checkpoint=checkpoint, data=data, n=n, tokens=tokens)
        with _progress() as on_progress:
            certificate = evaluate_coreml(bundle, asked, RunContext(on_progress=on_progress))
        _print_certificate(certificate.to_json())
        if as_json:
            _print_json(certificate.to_json())
        certificate.raise_if_failed()
        return
    manifest = opened.manifest
    _say(f"model          {manifest.model} ({manifest.family})")
    _say(
        f"visual tokens  {manifest.visual_tokens} of {manifest.visual_tokens_full}, "
        f"positions {manifest.positions}"
    )
    if "visual_layers" in manifest.kv_cache:
        cache = manifest.kv_cache
        _say(f"               in the first {cache['visual_layers']} of {cache['layers']} layers")
    _say(f"bytes          {opened.stored_bytes():,}")
    for component in manifest.components:
        precision = ", ".join(f"{part} {form}" for part, form in component.precision.items())
        _say(f"{component.target:<8} {component.role:<10} {component.file}  {precision}")
        for signature in (*component.inputs, *component.outputs):
            _say(f"    {signature.name:<16} {signature.dtype:<8} {list(signature.shape)}")
    for name in manifest.files:
        _say(f"{(opened.path / name).stat().st_size:>12,}  {name}")
    if as_json:
        _print_json({**manifest.to_json(), "bundle_bytes": opened.stored_bytes()})


@app.command(name="verify-coreml")
def verify_coreml(
    bundle: BundleArgument,
    checkpoint: CheckpointOption = None,
    data: QuestionsOption = None,
    n: Annotated[int, typer.Option(min=1, help="Questions.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens that are compared.")] = 16,
    units: Annotated[
        str, typer.Option(help="What Core ML may use: ALL, CPU_AND_NE, CPU_AND_GPU or CPU_ONLY.")
    ] = "ALL",
    iterations: Annotated[int, typer.Option(min=1, help="Timed predictions a function.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Certify and time a bundle's packages with Core ML itself. Needs an Apple machine."""
    _quiet_libraries()
    from pocketvlm.context import RunContext
    from pocketvlm.pipeline.verify_coreml import Questions
    from pocketvlm.pipeline.verify_coreml import verify_coreml as verify

    asked = Questions(checkpoint=checkpoint, data=data, n=n, tokens=tokens)
    with _progress() as on_progress:
        ctx = RunContext(on_progress=on_progress)
        found = verify(bundle, asked, ctx, units=units, iterations=iterations)
    document = found.to_json()
    if found.certificate is not None:
        _print_certificate(found.certificate.to_json())
    for function in document["functions"]:
        name = " ".join(filter(None, (function["file"], function["function"])))
        share = function["operator_shares"].get("neural_engine", 0.0)
        _say(
            f"{name:<40} {function['predict_ms']['median']:8.2f} ms  "
            f"Neural Engine {share:.0%} of {function['operators']} operators"
        )
    if as_json:
        _print_json(document)
    if found.failures:
        raise CheckFailedError("; ".join(found.failures))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")] = Path("runs/demo"),
    model: Annotated[str, typer.Option(help="A reference model.")] = "reference:pocket-llava",
    as_json: JsonOption = False,
) -> None:
    """Run the main job on a shipped reference model and ask the result about a picture."""
    _quiet_libraries()
    from pocketvlm.pipeline.job import Job

    job = Job(model=model, command=_command_line())
    with _progress() as on_progress:
        result = job.run(out, on_progress=on_progress)
        shown = job.ask_about_a_scene(result)
    _print_summary(result.report)
    _say(f"picture  {shown.image}")
    _say(f"asked    {shown.question}")
    _say(f"answer   {shown.answer}   (expected: {shown.expected})")
    _say(f"bundle   {result.out / 'bundle'}")
    _say(f"report   {result.out / 'report.html'}")
    if as_json:
        _print_json(result.report)
    if result.failures:
        raise CheckFailedError("; ".join(result.failures))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _print_json(document: Mapping[str, Any]) -> None:
    print(json.dumps(document, ensure_ascii=False, allow_nan=False))


def _fail(message: str, code: int) -> int:
    _say("error: " + " ".join(message.split()))
    return code


def _show_usage(error: typer.TyperException) -> int:
    """A usage error shows itself with the command's usage line; anything else is one line."""
    show = getattr(error, "show", None)
    if show is None:
        return _fail(str(error), 2)
    show()
    return 2


def _interrupted() -> int:
    _say("interrupted; the same command goes on where this one stopped")
    return 130


def _command_line() -> str:
    import shlex

    return shlex.join(["pocketvlm", *sys.argv[1:]])


def _quiet_libraries() -> None:
    """Keeps the libraries' own progress bars and notices off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # transformers imports torchao wherever it is installed, and it names each GPU library it lacks.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _progress() -> Iterator[ProgressCallback]:
    """A progress bar a task on stderr; plain silence where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def on_progress(step: Progress) -> None:
        raise_if_interrupted()
        if step.task not in tasks:
            tasks[step.task] = bars.add_task(step.task, total=step.total or None, note="")
        bars.update(tasks[step.task], completed=step.done, note=step.note)

    with bars, _noticed_interrupts() as raise_if_interrupted:
        yield on_progress


@contextmanager
def _noticed_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C that hits a finalizer is printed and forgotten by Python; here the next step stops."""
    noticed: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        noticed.append(number)
        signal.default_int_handler(number, frame)

    def raise_if_interrupted() -> None:
        if noticed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield raise_if_interrupted
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _print_summary(document: Mapping[str, Any]) -> None:
    size, quality = document["size"], document["quality"]
    several = len(size["parts"]) > 2  # noqa: PLR2004  (one target, and the processor's files)
    which = "the largest target " if several else ""
    _say(
        f"size     {size['bundle_bytes'] / 1e6:.2f} MB, "
        f"{which}{size['bundle_share']:.3f} of the source's weights"
    )
    if quality:
        compressed, plain = quality["compressed"], quality["float"]
        _say(
            f"quality  {compressed['accuracy']:.1%} from the bundle, {plain['accuracy']:.1%} float "
            f"(n={quality['n']}, {quality['metric']})"
        )
    verdict = "passed" if document["parity"]["passed"] else "FAILED"
    _say(f"parity   {verdict}")
    if document.get("bench"):
        _print_latency(document["bench"])
    for note in document["notes"]:
        _say(f"note     {note}")


def _print_certificate(document: Mapping[str, Any]) -> None:
    for name, target in document["targets"].items():
        _say(f"{name}: {target['details']['engine']}")
        for check in target["checks"]:
            verdict = "" if check["passed"] else "FAILED"
            value = "not finite" if check["value"] is None else f"{check['value']:.6g}"
            bounds = [
                f"{word} {check['bound'][key]:g}"
                for key, word in (("at_least", "at least"), ("at_most", "at most"))
                if check["bound"][key] is not None
            ]
            _say(f"  {check['metric']:<28} {value:>12}  {' and '.join(bounds):<28} {verdict}")
        details = target["details"]
        _say(
            f"  {'greedy tokens':<28} {details['greedy_tokens_equal']:>12}  "
            f"of {details['greedy_tokens_compared']}, near-ties {details['greedy_near_ties']}"
        )


def _print_latency(result: Mapping[str, Any]) -> None:
    for target, block in result["latency"].items():
        shown = [
            f"{name} {block[name]['median']:.1f}"
            for name in ("vision_ms", "prefill_ms", "ttft_user_ms", "decode_tok_s")
            if block.get(name) and block[name]["median"] is not None
        ]
        _say(f"{target:<8} " + ", ".join(shown))
    ratios = result.get("ratios") or {}
    shown = [
        f"{name} {ratios[name]:.2f} times"
        for name in ("ttft_user_ms", "decode_tok_s")
        if isinstance(ratios.get(name), int | float)
    ]
    if shown:
        _say("         " + ", ".join(shown) + " the baseline's")
