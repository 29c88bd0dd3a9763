"""Commands that look into a bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from pocketvlm.cli.console import print_certificate, print_json, quiet_libraries, say
from pocketvlm.cli.options import (
    MAX_QUESTIONS,
    BundleArgument,
    CheckpointOption,
    ComparedTokensOption,
    JsonOption,
    QuestionsOption,
)
from pocketvlm.cli.progress import show_progress

__all__ = ["inspect"]


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
    native_runner: Annotated[
        bool,
        typer.Option(
            "--native-runner",
            help="Ask ExecuTorch's own MultimodalRunner as well, and compare the answers.",
        ),
    ] = False,
    swift: Annotated[
        bool,
        typer.Option("--swift", help="Print a Swift file that answers questions from the bundle."),
    ] = False,
    checkpoint: CheckpointOption = None,
    data: QuestionsOption = None,
    n: Annotated[int, typer.Option(min=1, max=MAX_QUESTIONS, help="Questions that are asked.")] = 4,
    tokens: ComparedTokensOption = 16,
    as_json: JsonOption = False,
) -> None:
    """Check every digest of a bundle, and show what it holds."""
    from pocketvlm.bundle import Bundle

    opened = Bundle.open(bundle)
    if swift:
        from pocketvlm.export.coreml.swift import render_swift

        print(render_swift(opened), end="")
        return
    if evaluate:
        quiet_libraries()
        from pocketvlm.context import RunContext
        from pocketvlm.pipeline.questions import Questions
        from pocketvlm.pipeline.verify_coreml import evaluate_coreml

        asked = Questions(checkpoint=checkpoint, data=data, n=n, tokens=tokens)
        with show_progress() as on_progress:
            certificate = evaluate_coreml(bundle, asked, RunContext(on_progress=on_progress))
        print_certificate(certificate)
        if as_json:
            print_json(certificate.to_json())
        certificate.raise_if_failed()
        return
    if native_runner:
        from pocketvlm.context import RunContext
        from pocketvlm.pipeline.native_runner import compare_native_runner
        from pocketvlm.pipeline.questions import Questions

        asked = Questions(data=data, n=n, tokens=tokens)
        with show_progress() as on_progress:
            found = compare_native_runner(bundle, asked, RunContext(on_progress=on_progress))
        same = found.compared - len(found.differences)
        say(f"MultimodalRunner gives {same} of {found.compared} answers as this package does")
        if as_json:
            print_json(found.to_json())
        found.raise_if_failed()
        return
    manifest = opened.manifest
    say(f"model          {manifest.model} ({manifest.family})")
    say(
        f"visual tokens  {manifest.visual_tokens} of {manifest.visual_tokens_full}, "
        f"positions {manifest.positions}"
    )
    for variant in manifest.variants:
        say(
            f"               {variant.name}: {variant.visual_tokens} of "
            f"{variant.visual_tokens_full} for pictures of {variant.width} x {variant.height}"
        )
    if manifest.tile_budget is not None:
        say(f"               per tile: {manifest.tile_budget.describe()}")
    if manifest.prompt.tile_marker is not None or manifest.prompt.line_break is not None:
        say("               per tile: large pictures are cut into several, and shown whole as well")
    cache = manifest.kv_cache
    if cache.visual_schedule is not None:
        say(f"               of {cache.layers} layers, {cache.visual_schedule.describe()}")
    say(f"bytes          {opened.stored_bytes():,}")
    for target, needs in manifest.runtimes.items():
        operators = f", operators {', '.join(needs.operators)}" if needs.operators else ""
        say(f"{target:<14} needs {needs.runtime} {needs.lowest_version} or newer{operators}")
    made = {
        (component.target, output.name)
        for component in manifest.components
        if component.role == "unpack"
        for output in component.outputs
    }
    for component in manifest.components:
        precision = ", ".join(f"{part} {form}" for part, form in component.precision.items())
        place = (
            component.file
            if component.variant is None
            else (f"{component.file} ({component.variant})")
        )
        say(f"{component.target:<8} {component.role:<10} {place}  {precision}")
        signatures = (*component.inputs, *component.outputs)
        shown = [each for each in signatures if (component.target, each.name) not in made]
        for signature in shown:
            say(f"    {signature.name:<16} {signature.dtype:<8} {list(signature.shape)}")
        if len(shown) < len(signatures):
            say(f"    and {len(signatures) - len(shown)} weights that a runner makes")
    for name in manifest.files:
        say(f"{(opened.path / name).stat().st_size:>12,}  {name}")
    if as_json:
        print_json({**manifest.to_json(), "bundle_bytes": opened.stored_bytes()})
