"""The engines that run a bundle on this host, and which one is taken when nobody says.

A bundle may hold several targets. ONNX Runtime comes first: it needs nothing that the package does
not bring. Core ML packages come last: what computes them here is the reference evaluator, which
gives their answers and tells nothing of their speed.

An engine is imported when it is opened: what plans or runs another one does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, InputError
from pocketvlm.runtime.runner import Runner

__all__ = [
    "EMULATED",
    "ENGINES",
    "Engine",
    "choose_engine",
    "open_engine",
    "spilling_engines",
]

Engine = Callable[[Bundle, int | None, int], Runner]
"""Opens a bundle, given threads (`None`: the engine's own choice) and rows of KV cache needed."""


def _open_onnx(
    bundle: Bundle, threads: int | None, rows: int, *, spill_folder: Path | None = None
) -> Runner:
    from pocketvlm.runtime.onnx.runner import DEFAULT_CAPACITY, OnnxRunner

    return OnnxRunner(
        bundle,
        threads=threads,
        capacity=rows if rows > DEFAULT_CAPACITY else None,
        spill_folder=spill_folder,
    )


def _open_executorch(bundle: Bundle, threads: int | None, _rows: int) -> Runner:
    from pocketvlm.runtime.executorch.runner import ExecutorchRunner

    return ExecutorchRunner(bundle, threads=threads)


def _open_coreml(bundle: Bundle, _threads: int | None, _rows: int) -> Runner:
    from pocketvlm.runtime.coreml.runner import CoremlRunner

    return CoremlRunner(bundle)


ENGINES: Mapping[str, Engine] = {
    "onnx": _open_onnx,
    "executorch": _open_executorch,
    "coreml": _open_coreml,
}
"""How each target is opened, in order of preference."""

EMULATED = frozenset({"coreml"})
"""Targets that something else than their own engine computes here: never to be timed."""


def spilling_engines(folder: Path) -> Mapping[str, Engine]:
    """The same engines, with weights that they make when they start in a file below a folder.

    For work beside which a model may not fit into memory. Nothing is left in the folder.
    """
    return {**ENGINES, "onnx": partial(_open_onnx, spill_folder=folder)}


def choose_engine(bundle: Bundle, name: str | None = None) -> str:
    """The engine that was asked for, or the first that the bundle has graphs for.

    Raises:
        InputError: There is no such engine.
        BundleError: The bundle has no graphs for it, or for any.
    """
    if name is not None:
        if name not in ENGINES:
            raise InputError(f"runtime is {name!r}; allowed are {', '.join(ENGINES)}")
        bundle.component(name, "decoder")
        return name
    targets = {component.target for component in bundle.manifest.components}
    for known in ENGINES:
        if known in targets:
            return known
    raise BundleError(
        f"{bundle.path}: has graphs for {', '.join(sorted(targets)) or 'nothing'}; this host runs "
        f"{', '.join(ENGINES)}"
    )


def open_engine(
    bundle: Bundle,
    name: str | None = None,
    *,
    threads: int | None = None,
    rows: int = 0,
    engines: Mapping[str, Engine] = ENGINES,
) -> Runner:
    """Loads a bundle into an engine.

    Args:
        bundle: An opened bundle.
        name: The engine, or `None` for the first that fits.
        threads: Threads for the heavy graphs; `None` leaves that to the engine.
        rows: Rows of KV cache that are needed, where they are more than the engine has by itself;
            a program whose cache was fixed when it was exported cannot give them.
        engines: How each is opened.

    Raises:
        InputError: There is no such engine.
        MissingExtraError: It is not installed.
        BundleError: The bundle cannot be run by it.
    """
    return engines[choose_engine(bundle, name)](bundle, threads, rows)
