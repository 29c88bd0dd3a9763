"""Packages written by coremltools itself, from programs that a test builds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pocketvlm.emulation.mil.package import MilPackage
from pocketvlm.emulation.mil.program import MilProgram

Build = Callable[..., Any]


def toolkit() -> SimpleNamespace:
    """coremltools and the parts of its program builder; its import warns, and writes notices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools as ct
        from coremltools.converters.mil.converter import mil_convert
        from coremltools.converters.mil.mil import Builder, Function, Program, types
    return SimpleNamespace(
        ct=ct, mb=Builder, Function=Function, Program=Program, types=types, convert=mil_convert
    )


def write_package(
    path: Path,
    functions: Mapping[str, tuple[Mapping[str, Any], Build]],
    *,
    target: str = "iOS18",
    default: str | None = None,
) -> Path:
    """Writes a package whose functions are `build(mb, **inputs)`, nothing optimised away.

    Args:
        path: The package.
        functions: Input specifications and what builds the outputs, by the function's name.
        target: Deployment target.
        default: Name of the default function.
    """
    kit = toolkit()
    version = getattr(kit.ct.target, target)
    program = kit.Program()
    for name, (inputs, build) in functions.items():
        with kit.Function(dict(inputs), opset_version=version) as function:
            outputs = build(kit.mb, **function.inputs)
            function.set_outputs(outputs if isinstance(outputs, list) else [outputs])
        program.add_function(name, function)
    several = len(functions) > 1
    program.default_function_name = default or next(iter(functions))
    program.export_as_multifunction = several
    empty = kit.ct.PassPipeline.EMPTY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kit.convert(
            program,
            convert_from="milinternal",
            convert_to="mlprogram",
            specification_version=version,
            compute_units=kit.ct.ComputeUnit.CPU_ONLY,
            export_multi_functions=several,
            skip_model_load=True,
            pass_pipeline=empty,
            main_pipeline=empty,
        )
        model.save(str(path))
    return path


def open_program(path: Path) -> MilProgram:
    return MilProgram(MilPackage.open(path))
