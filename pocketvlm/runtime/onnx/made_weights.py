"""Weights that a runner makes of others when it starts, instead of reading them from a file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError
from pocketvlm.runtime.onnx.engine import naming_graph
from pocketvlm.runtime.onnx.sessions import bind_output, load_graph, return_freed_memory

__all__ = ["make_weights"]

_DTYPES = {"int8": np.int8, "float32": np.float32}
_MOST_BYTES = 2**40


def make_weights(bundle: Bundle, threads: int) -> dict[str, npt.NDArray[Any]]:
    """Runs the bundle's `unpack` graph, once.

    Returns:
        What it made, by name.

    Raises:
        BundleError: There is no such graph, it cannot be run, or the manifest states no sizes.
    """
    component = bundle.component("onnx", "unpack")
    session = load_graph(bundle, component, threads)
    binding = session.io_binding()
    made: dict[str, npt.NDArray[Any]] = {}
    for output in component.outputs:
        shape = [size for size in output.shape if isinstance(size, int) and size > 0]
        dtype = _DTYPES.get(output.dtype)
        if dtype is None or len(shape) < len(output.shape) or math.prod(shape) > _MOST_BYTES:
            raise BundleError(
                f"{bundle.path / component.file}: makes {output.name} as {output.dtype} of "
                f"{list(output.shape)}; sizes must be fixed, and types {', '.join(_DTYPES)}"
            )
        made[output.name] = np.empty(shape, dtype)
        bind_output(binding, output.name, made[output.name])
    with naming_graph(bundle.path / component.file):
        session.run_with_iobinding(binding)
    del binding, session
    return_freed_memory()
    return made
