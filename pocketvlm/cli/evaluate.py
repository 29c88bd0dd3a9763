"""Commands that ask a bundle or a checkpoint questions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pocketvlm.cli.console import print_json, quiet_libraries, say
from pocketvlm.cli.options import (
    MAX_QUESTIONS,
    BundleArgument,
    JsonOption,
    ResolutionOption,
    RuntimeOption,
    ThreadsOption,
    VisualTokensOption,
    parse_resolution,
)
from pocketvlm.cli.progress import show_progress
from pocketvlm.printable import printable

__all__ = ["ask", "evaluate"]


def ask(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", help="A picture; repeat for several, in their order."),
    ] = None,
    visual_tokens: VisualTokensOption = None,
    resolution: ResolutionOption = None,
    runtime: RuntimeOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=1_000_000)] = 128,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about pictures from the bundle alone.

    Pictures stand before the text, in the order in which they are named.
    """
    from dataclasses import asdict

    from pocketvlm.bundle import Bundle
    from pocketvlm.runtime.conversation import Conversation
    from pocketvlm.runtime.engines import open_engine
    from pocketvlm.runtime.vision import VisionChoice

    def show(piece: str) -> None:
        if not as_json:
            print(printable(piece), end="", flush=True)

    opened = Bundle.open(bundle)
    conversation = Conversation(opened, runner=open_engine(opened, runtime, threads=threads))
    answer = conversation.ask(
        prompt,
        image=image,
        vision=VisionChoice(visual_tokens=visual_tokens, resolution=parse_resolution(resolution)),
        max_new_tokens=max_new_tokens,
        on_token=show,
    )
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
        str,
        typer.Argument(
            metavar="CHECKPOINT_OR_BUNDLE",
            help="The checkpoint or bundle that answers the questions.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(help="A folder of pictures and questions, reference:SEED or mosaics:SEED."),
    ] = "reference:1",
    n: Annotated[int, typer.Option(min=1, max=MAX_QUESTIONS, help="Questions.")] = 500,
    arithmetic: Annotated[
        str, typer.Option(help="Round a checkpoint's activations as onnx or executorch does.")
    ] = "float32",
    visual_tokens: VisualTokensOption = None,
    resolution: ResolutionOption = None,
    runtime: RuntimeOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score generated answers, beside a blind floor."""
    quiet_libraries()
    from pocketvlm.context import RunContext
    from pocketvlm.pipeline.sources import load_evaluation, long_call_rows, score_subject
    from pocketvlm.runtime.vision import VisionChoice

    vision = VisionChoice(visual_tokens=visual_tokens, resolution=parse_resolution(resolution))
    samples = load_evaluation(data, n)
    long_rows = long_call_rows(subject) if arithmetic == "onnx" else None
    with show_progress() as on_progress:
        ctx = RunContext(threads=threads or os.cpu_count() or 1, on_progress=on_progress)
        score = score_subject(subject, samples, ctx, arithmetic, runtime, vision, long_rows)
    document = score.to_json()
    notes = list(samples.notes)
    if long_rows is not None:
        notes.append(
            f"prompts of {long_rows} rows and more run on int8 rows, as in the bundle beside it"
        )
    for note in notes:
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
        print_json({**document, "notes": notes})
