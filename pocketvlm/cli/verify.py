"""Commands that run a bundle again: on this host, on another instruction set, by Core ML itself."""

from __future__ import annotations

from pathlib import Path
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
    RuntimeOption,
)
from pocketvlm.cli.progress import show_progress
from pocketvlm.errors import CheckFailedError, InputError

__all__ = ["verify", "verify_coreml"]

_ARCHITECTURES = ("host", "arm64")


def verify(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="BUNDLE", help="A bundle's folder; not needed with --prepare."),
    ] = None,
    arch: Annotated[
        str, typer.Option(help="host, or arm64: emulated, and compared with this host.")
    ] = "host",
    cpu: Annotated[
        str | None,
        typer.Option(help="The ARM64 processor: cortex-a76 (default), cortex-a710, max, ..."),
    ] = None,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="Build the ARM64 environment first, if it is not there."),
    ] = False,
    runtime: RuntimeOption = None,
    data: QuestionsOption = None,
    n: Annotated[int, typer.Option(min=1, max=MAX_QUESTIONS, help="Questions.")] = 4,
    tokens: ComparedTokensOption = 16,
    write: Annotated[
        bool, typer.Option("--write", help="Add the result to the bundle's parity.json.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a bundle's own runtime again, here or emulated.

    On emulated ARM64 its answers are compared with this host's.
    """
    if arch not in _ARCHITECTURES:
        raise InputError(f"--arch is {arch!r}; allowed are {', '.join(_ARCHITECTURES)}")
    if arch == "host" and (cpu is not None or prepare):
        raise InputError("--cpu and --prepare are for --arch arm64")
    if bundle is None and not prepare:
        raise InputError("there is nothing to verify: name a bundle's folder")
    quiet_libraries()
    from pocketvlm.bundle import Bundle
    from pocketvlm.context import RunContext
    from pocketvlm.emulation.arm64.environment import environment_folder
    from pocketvlm.emulation.arm64.prepare import open_emulator
    from pocketvlm.pipeline.assemble import add_to_parity
    from pocketvlm.pipeline.questions import Questions, choose_samples
    from pocketvlm.pipeline.verify import verify_bundle

    opened = None if bundle is None else Bundle.open(bundle)
    with show_progress() as on_progress:
        ctx = RunContext(on_progress=on_progress)
        emulator = open_emulator(ctx, cpu=cpu, prepare=prepare) if arch == "arm64" else None
        if opened is None:
            say(f"ready    {environment_folder()}")
            return
        samples = choose_samples(opened, Questions(data=data, n=n))
        found = verify_bundle(
            opened, samples, ctx, tokens=tokens, runtime=runtime, emulator=emulator
        )
    for machine in found.machines:
        say(f"{machine.name:<8} {machine.line()}")
    print_certificate(found.found)
    if found.certified is not None:
        known = found.certified
        say(
            f"  of the certificate's tokens {known['greedy_tokens_equal']} of "
            f"{known['greedy_tokens_compared']} are the same, near-ties {known['greedy_near_ties']}"
        )
    document = found.to_json()
    if write:
        add_to_parity(opened, {"verified": {found.name: document}})
    if as_json:
        print_json(document)
    found.found.raise_if_failed()


def verify_coreml(
    bundle: BundleArgument,
    checkpoint: CheckpointOption = None,
    data: QuestionsOption = None,
    n: Annotated[int, typer.Option(min=1, max=MAX_QUESTIONS, help="Questions.")] = 4,
    tokens: ComparedTokensOption = 16,
    units: Annotated[
        str, typer.Option(help="What Core ML may use: ALL, CPU_AND_NE, CPU_AND_GPU or CPU_ONLY.")
    ] = "ALL",
    iterations: Annotated[
        int, typer.Option(min=1, max=100_000, help="Timed predictions per function.")
    ] = 20,
    as_json: JsonOption = False,
) -> None:
    """Certify and time a bundle's packages with Core ML itself. Needs an Apple machine."""
    quiet_libraries()
    from pocketvlm.context import RunContext
    from pocketvlm.pipeline.questions import Questions
    from pocketvlm.pipeline.verify_coreml import verify_coreml as verify

    asked = Questions(checkpoint=checkpoint, data=data, n=n, tokens=tokens)
    with show_progress() as on_progress:
        ctx = RunContext(on_progress=on_progress)
        found = verify(bundle, asked, ctx, units=units, iterations=iterations)
    document = found.to_json()
    if found.certificate is not None:
        print_certificate(found.certificate)
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
