"""Sessions: graphs of a bundle, loaded by ONNX Runtime as each of them runs best."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy.typing as npt

from pocketvlm.bundle import Bundle, Component
from pocketvlm.errors import BundleError
from pocketvlm.runtime.onnx.engine import LOAD_ERRORS, first_line, require_exact_sums
from pocketvlm.runtime.onnx.engine import onnxruntime as ort
from pocketvlm.runtime.onnx.external_data import require_signed_data

__all__ = ["bind_input", "bind_output", "load_graph", "return_freed_memory", "shrinking_run"]


def load_graph(bundle: Bundle, component: Component, threads: int) -> ort.InferenceSession:
    """Loads a graph.

    Args:
        bundle: An opened bundle.
        component: The graph.
        threads: Threads for it, where it is a heavy one; 0 for all cores.

    Raises:
        BundleError: It does not load, or is not the one that the manifest describes.
    """
    role = component.role
    require_signed_data(bundle, component.file)
    file = bundle.file(component.file)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    require_exact_sums(options)
    # The embedding is a lookup: its own pool would only spin beside the decoder's.
    options.intra_op_num_threads = 1 if role == "embedding" else threads
    if role in ("vision", "prefill", "unpack"):
        # Its threads must not spin while the decoder's work.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if role in ("vision", "unpack"):
        # It runs once per picture, which then gives back its activations: nothing is kept for them.
        options.enable_mem_pattern = False
    if role == "unpack":
        options.enable_cpu_mem_arena = False
        # All of its inputs are constant. Folded, every step of every layer would be held at once.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(
            str(file), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except (*LOAD_ERRORS, UnicodeDecodeError) as error:
        raise BundleError(f"{file}: ONNX Runtime cannot load it: {first_line(error)}") from error
    _require_signature(component, session, file)
    # Weights that are expanded in steps leave several times their size to be freed.
    return_freed_memory()
    return session


def shrinking_run() -> ort.RunOptions:
    """Options of a run that gives back what it took for activations.

    Without an arena glibc keeps pieces between them: of a tower with 1,025 tokens the peak was
    179 MB in place of 100.
    """
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def return_freed_memory() -> None:
    """Has glibc give back what was freed; it keeps 180 MB of a SmolVLM-256M tower otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def bind_input(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    """Has a graph read an array, which must live as long as the binding."""
    binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))


def bind_output(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    """Has a graph write to an array, which must live as long as the binding."""
    binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))


def _require_signature(component: Component, session: ort.InferenceSession, file: Path) -> None:
    """Refuses a graph whose inputs or outputs are not those that the manifest names."""
    for kind, said, found in (
        ("inputs", component.inputs, session.get_inputs()),
        ("outputs", component.outputs, session.get_outputs()),
    ):
        names = {signature.name for signature in said}
        there = {value.name for value in found}
        if names != there:
            raise BundleError(
                f"{file}: has the {kind} {', '.join(sorted(there ^ names))} that only one of graph "
                f"and manifest knows"
            )
