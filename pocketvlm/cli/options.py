"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pocketvlm.errors import InputError

__all__ = [
    "MAX_QUESTIONS",
    "BundleArgument",
    "CalibrationOption",
    "CheckpointOption",
    "ComparedTokensOption",
    "DataOption",
    "JsonOption",
    "ModelArgument",
    "QuestionsOption",
    "RecipeOption",
    "ResolutionOption",
    "RuntimeOption",
    "SeedOption",
    "SetOption",
    "TargetOption",
    "ThreadsOption",
    "VisualTokensOption",
    "out_option",
    "parse_resolution",
]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local directory, a hub id, reference:pocket-llava, reference:pocket-smol, "
        "reference:pocket-tiles, or shape:NAME, the sizes of a published model such as "
        "smolvlm-500m (random weights).",
    ),
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        help="The checkpoint that the bundle was made from. Default: the one next to the bundle."
    ),
]
ComparedTokensOption = Annotated[
    int, typer.Option(min=1, max=4096, help="Greedy tokens that are compared.")
]
QuestionsOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A folder of pictures and questions, reference:SEED or mosaics:SEED. Default: "
        "generated ones.",
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="A folder of pictures and questions, `photos`, photos:FOLDER, `reference`, `mosaics` "
        "or `synthetic`. Default: the recipe's.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Questions to score: a folder, reference:SEED, mosaics:SEED, or none. Default: seed 1 "
        "of what a reference model was trained on, else none.",
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
    typer.Option("--set", metavar="A.B=C", help="Change to the recipe, e.g. stages.0.keep=0.25."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="Threads. Default: one per core.")
]
VisualTokensOption = Annotated[
    int | None,
    typer.Option(
        "--visual-tokens",
        min=1,
        help="The vision graph with this many tokens per tile, where a bundle has several.",
    ),
]
ResolutionOption = Annotated[
    str | None,
    typer.Option(
        "--resolution",
        metavar="WIDTHxHEIGHT",
        help="The vision graph for pictures of this size. Default: the one closest to a picture's "
        "ratio of sides.",
    ),
]
RuntimeOption = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        help="onnx, executorch, or coreml: the reference evaluator. Default: what the bundle has.",
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of every random choice.")
]
MAX_QUESTIONS = 100_000
"""The most questions that one command scores; all are read or made before the first is asked."""


def parse_out(name: str | Path) -> Path:
    """Refuses an empty name: `--out "$UNSET"` must not write into the current folder.

    Raises:
        InputError: The name is empty, or is `-`, which means standard output to other tools.
    """
    if str(name).strip() in ("", "-"):
        raise InputError(f"--out: {str(name)!r} does not name a file or folder; ./- would")
    return Path(name)


def parse_resolution(text: str | None) -> tuple[int, int] | None:
    """Width and height of `--resolution`.

    Raises:
        InputError: It is not two numbers.
    """
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise InputError(f"--resolution is {text!r}; write width and height, such as 448x336")
    return int(width), int(height)


def out_option(meaning: str) -> Any:
    """The option `--out`, with `meaning` as its help text."""
    return typer.Option("--out", "-o", parser=parse_out, metavar="PATH", help=meaning)
