"""Commands that ask a bundle or a checkpoint, and look at what is in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pocketvlm.cli.console import print_certificate, print_json, quiet_libraries, say
from pocketvlm.cli.options import (
    MAX_QUESTIONS,
    BundleArgument,
    CheckpointOption,
    JsonOption,
    QuestionsOption,
    RuntimeOption,
    ThreadsOption,
)
from pocketvlm.cli.progress import show_progress
from pocketvlm.errors import CheckFailedError
from pocketvlm.printable import printable

__all__ = ["ask", "evaluate", "inspect", "verify_coreml"]


def ask(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", help="A picture; repeat for several, in their order."),
    ] = None,
    runtime: RuntimeOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=1_000_000)] = 128,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about pictures from the bundle alone, streamed.

    Pictures stand before the text, in the order in which they are named.

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
            print(printable(piece), end="", flush=True)

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
        print_json(
            {
                "text": answer.text,
                "token_ids": list(answer.token_ids),
                "timings": asdict(answer.timings),
            }
        )
    else:
        print()


def evaluate(
    subject: Annotated[
        str, typer.Argument(metavar="CHECKPOINT_OR_BUNDLE", help="What answers the questions.")
    ],
    data: Annotated[
        str, typer.Option(help="A folder of pictures and questions, or reference:SEED.")
    ] = "reference:1",
    n: Annotated[int, typer.Option(min=1, max=MAX_QUESTIONS, help="Questions.")] = 500,
    arithmetic: Annotated[
        str, typer.Option(help="Round a checkpoint's activations as onnx or executorch does.")
    ] = "float32",
    runtime: RuntimeOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score generated answers, with a 95 % interval and the blind floor."""
    quiet_libraries()
    from pocketvlm.context import RunContext
    from pocketvlm.pipeline.sources import load_evaluation, score_subject

    samples = load_evaluation(data, n)
    with show_progress() as on_progress:
        ctx = RunContext(threads=threads or os.cpu_count() or 1, on_progress=on_progress)
        score = score_subject(subject, samples, ctx, arithmetic, runtime)
    document = score.to_json()
    for note in samples.notes:
        say(f"note     {note}")
    say(
        f"{document['metric']}  {score.accuracy:.1%}  "
        f"[{score.interval_low:.1%}, {score.interval_high:.1%}]  n={score.n}"
    )
    for kind, row in score.per_kind.items():
        say(f"  {kind:<10} {row.accuracy:.1%}  n={row.n}")
    if score.blind is not None:
        say(f"blind floor  {score.blind:.1%}")
    if as_json:
        print_json({**document, "notes": list(samples.notes)})


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
    n: Annotated[int, typer.Option(min=1, max=MAX_QUESTIONS, help="Questions for --evaluate.")] = 4,
    tokens: Annotated[
        int, typer.Option(min=1, max=4096, help="Greedy tokens that are compared.")
    ] = 16,
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
        quiet_libraries()
        from pocketvlm.context import RunContext
        from pocketvlm.pipeline.verify_coreml import Questions, evaluate_coreml

        asked = Questions(checkpoint=checkpoint, data=data, n=n, tokens=tokens)
        with show_progress() as on_progress:
            certificate = evaluate_coreml(bundle, asked, RunContext(on_progress=on_progress))
        print_certificate(certificate.to_json())
        if as_json:
            print_json(certificate.to_json())
        certificate.raise_if_failed()
        return
    manifest = opened.manifest
    say(f"model          {manifest.model} ({manifest.family})")
    say(
        f"visual tokens  {manifest.visual_tokens} of {manifest.visual_tokens_full}, "
        f"positions {manifest.positions}"
    )
    cache = manifest.kv_cache
    if cache.visual_layers is not None:
        say(f"               in the first {cache.visual_layers} of {cache.layers} layers")
    say(f"bytes          {opened.stored_bytes():,}")
    for target, needs in manifest.runtimes.items():
        operators = f", operators {', '.join(needs.operators)}" if needs.operators else ""
        say(f"{target:<14} needs {needs.runtime} {needs.lowest_version} or newer{operators}")
    for component in manifest.components:
        precision = ", ".join(f"{part} {form}" for part, form in component.precision.items())
        say(f"{component.target:<8} {component.role:<10} {component.file}  {precision}")
        for signature in (*component.inputs, *component.outputs):
            say(f"    {signature.name:<16} {signature.dtype:<8} {list(signature.shape)}")
    for name in manifest.files:
        say(f"{(opened.path / name).stat().st_size:>12,}  {name}")
    if as_json:
        print_json({**manifest.to_json(), "bundle_bytes": opened.stored_bytes()})


def verify_coreml(
    bundle: BundleArgument,
    checkpoint: CheckpointOption = None,
    data: QuestionsOption = None,
    n: Annotated[int, typer.Option(min=1, max=MAX_QUESTIONS, help="Questions.")] = 4,
    tokens: Annotated[
        int, typer.Option(min=1, max=4096, help="Greedy tokens that are compared.")
    ] = 16,
    units: Annotated[
        str, typer.Option(help="What Core ML may use: ALL, CPU_AND_NE, CPU_AND_GPU or CPU_ONLY.")
    ] = "ALL",
    iterations: Annotated[
        int, typer.Option(min=1, max=100_000, help="Timed predictions a function.")
    ] = 20,
    as_json: JsonOption = False,
) -> None:
    """Certify and time a bundle's packages with Core ML itself. Needs an Apple machine."""
    quiet_libraries()
    from pocketvlm.context import RunContext
    from pocketvlm.pipeline.verify_coreml import Questions
    from pocketvlm.pipeline.verify_coreml import verify_coreml as verify

    asked = Questions(checkpoint=checkpoint, data=data, n=n, tokens=tokens)
    with show_progress() as on_progress:
        ctx = RunContext(on_progress=on_progress)
        found = verify(bundle, asked, ctx, units=units, iterations=iterations)
    document = found.to_json()
    if found.certificate is not None:
        print_certificate(found.certificate.to_json())
    for function in document["functions"]:
        name = " ".join(filter(None, (function["file"], function["function"])))
        share = function["operator_shares"].get("neural_engine", 0.0)
        say(
            f"{name:<40} {function['predict_ms']['median']:8.2f} ms  "
            f"Neural Engine {share:.0%} of {function['operators']} operators"
        )
    if as_json:
        print_json(document)
    if found.failures:
        raise CheckFailedError("; ".join(found.failures))
