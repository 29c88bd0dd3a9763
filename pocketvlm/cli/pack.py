"""The command that packs the runner for machines without this package."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pocketvlm.cli.console import print_json, say
from pocketvlm.cli.options import JsonOption

__all__ = ["pack_runner"]


def pack_runner(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    runtime: Annotated[
        str, typer.Option(help="What runs bundles there: onnx, executorch or coreml.")
    ] = "onnx",
    wheels: Annotated[
        Path | None,
        typer.Option(help="A folder of wheels to put into it, for a machine without a network."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Pack the torch-free runner as a self-contained folder.

    It runs where Python runs.
    """
    from pocketvlm.device_bench.pack.folder import pack_runner as pack

    packed = pack(out, runtime=runtime, wheels=wheels)
    say(f"{packed.path}: {packed.modules} modules, {packed.stored_bytes / 1e6:.1f} MB")
    say(f"needs Python 3.11 or newer and {', '.join(packed.requirements)}")
    say("on the device: sh install, then sh run < JOB")
    if as_json:
        print_json({**asdict(packed), "path": str(packed.path)})
