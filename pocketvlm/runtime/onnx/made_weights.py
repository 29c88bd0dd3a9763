"""Weights that a runner makes of others when it starts, instead of reading them from a file."""

from __future__ import annotations

import math
import mmap
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError
from pocketvlm.files.full_disk import naming_faults
from pocketvlm.runtime.onnx.engine import naming_graph
from pocketvlm.runtime.onnx.sessions import bind_output, load_graph, return_freed_memory

__all__ = ["make_weights"]

# Not int8: products of such codes, where they are not constant, saturate on x86 without VNNI.
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("uint8", "float32")}
_MOST_BYTES = 2**40
_ALIGNMENT = 64
_PIECE_BYTES = 2**24


def make_weights(
    bundle: Bundle, threads: int, spill_folder: Path | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Runs the bundle's `unpack` graph, once.

    Args:
        bundle: An opened bundle.
        threads: Threads for the graph; 0 for all cores.
        spill_folder: Where what it made lies in an unnamed file, whose pages the system takes back
            when memory is short; `None` for memory.

    Returns:
        What it made, by name.

    Raises:
        BundleError: There is no such graph, it cannot be run, or the manifest states no sizes.
        StorageError: The disk is full.
    """
    component = bundle.component("onnx", "unpack")
    session = load_graph(bundle, component, threads)
    binding = session.io_binding()
    places: dict[str, tuple[slice, list[int], np.dtype[Any]]] = {}
    end = 0
    for output in component.outputs:
        shape = [size for size in output.shape if isinstance(size, int) and size > 0]
        dtype = _DTYPES.get(output.dtype)
        if dtype is None or len(shape) < len(output.shape) or math.prod(shape) > _MOST_BYTES:
            raise BundleError(
                f"{bundle.path / component.file}: makes {output.name} as {output.dtype} of "
                f"{list(output.shape)}; sizes must be fixed, and types {', '.join(_DTYPES)}"
            )
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + math.prod(shape) * dtype.itemsize
        places[output.name] = slice(start, end), shape, dtype
    room = _allocate(end, spill_folder)
    made = {
        name: room[place].view(dtype).reshape(shape)
        for name, (place, shape, dtype) in places.items()
    }
    for name, values in made.items():
        bind_output(binding, name, values)
    with naming_graph(bundle.path / component.file):
        session.run_with_iobinding(binding)
    del binding, session
    return_freed_memory()
    return made


def _allocate(size: int, folder: Path | None) -> npt.NDArray[np.uint8]:
    """Bytes in memory, or in an unnamed file whose room on the disk is taken at once."""
    if folder is None:
        return np.empty(size, np.uint8)
    with naming_faults(folder), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        zeros, left = memoryview(bytes(min(size, _PIECE_BYTES))), size
        while left:
            left -= file.write(zeros[:left])
        return np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
