"""ONNX Runtime: the one module that imports it.

All other code, tests and benchmarks included, imports it from here, so that it is never imported
before `pocketvlm.environment` has turned off its telemetry. ruff refuses any other import.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _errors

from pocketvlm.errors import BundleError
from pocketvlm.machine import describe_processor

__all__ = [
    "EXACT_SUMS",
    "LOAD_ERRORS",
    "first_line",
    "naming_graph",
    "onnxruntime",
    "require_exact_sums",
]

EXACT_SUMS = ("session.x64quantprecision", "1")
"""The setting under which no kernel adds products of bytes in 16 bits, where they saturate."""

_X86 = ("x86_64", "AMD64")
_WIDE_SUMS = re.compile(r"avx512_?vnni|avx_?vnni.*", re.IGNORECASE)

LOAD_ERRORS = (
    _errors.EPFail,
    _errors.Fail,
    _errors.InvalidArgument,
    _errors.InvalidGraph,
    _errors.InvalidProtobuf,
    _errors.NoModel,
    _errors.NoSuchFile,
    _errors.NotImplemented,
    _errors.RuntimeException,
)
"""What a session raises when it cannot load a graph."""

# Bindings that do not fit are a bare `RuntimeError`; the text of an error may hold a graph's bytes,
# which Python refuses to decode.
_RUN_ERRORS = (*LOAD_ERRORS, RuntimeError, UnicodeDecodeError)


def require_exact_sums(options: onnxruntime.SessionOptions) -> None:
    """Has a session choose kernels whose integer sums are exact on this machine.

    On x86 without VNNI, products of int8 weights are added in pairs of 16 bits by default, which
    cannot hold the largest: the same bundle would answer differently there. The setting costs time
    where it is not needed, so it is left alone elsewhere.
    """
    processor = describe_processor()
    if processor["machine"] not in _X86:
        return
    if not any(_WIDE_SUMS.fullmatch(name) for name in processor["instruction_sets"]):
        options.add_session_config_entry(*EXACT_SUMS)


@contextmanager
def naming_graph(file: Path) -> Iterator[None]:
    """Turns what ONNX Runtime raises while it runs a graph into one line that names it.

    Args:
        file: The graph.

    Raises:
        BundleError: The graph cannot be run.
    """
    try:
        yield
    except _RUN_ERRORS as error:
        raise BundleError(f"{file}: ONNX Runtime cannot run it: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error, whatever bytes it holds."""
    if isinstance(error, UnicodeDecodeError):
        return error.object.decode("utf-8", "replace").strip().partition("\n")[0]
    return str(error).strip().partition("\n")[0]
