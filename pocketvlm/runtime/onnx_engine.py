"""ONNX Runtime: the one module that imports it.

Whoever needs it, tests and benchmarks included, takes it from here, so that it is never imported
before `pocketvlm.environment` has told it to report to nobody. ruff refuses any other import.
"""

from __future__ import annotations

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _errors

__all__ = ["LOAD_ERRORS", "onnxruntime"]

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
