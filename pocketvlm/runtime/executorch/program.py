"""Finds a bundle's ExecuTorch program, and loads it with the pip package's own runtime.

Loading trusts the file: one that is damaged can end the process. Programs of a bundle are therefore
loaded by `worker` alone, in the process that `process` starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import struct
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, MissingExtraError
from pocketvlm.runtime.native_output import quiet_terminal
from pocketvlm.runtime.versions import require_runtime

__all__ = [
    "PROGRAM_HEADER",
    "PROGRAM_HEADER_START",
    "find_program",
    "load_program",
    "register_operators",
    "require_executorch",
    "set_threads",
]

PROGRAM_HEADER = struct.Struct("<4sIQQQ")
"""A program's extended header: magic, length, bytes of its flatbuffer, base and bytes of its
segments."""

PROGRAM_HEADER_START = 8
_MAGIC = b"eh00"


def require_executorch() -> None:
    """Checks that the runtime is installed, without importing it.

    Raises:
        MissingExtraError: It is not.
    """
    if importlib.util.find_spec("executorch") is None:
        raise MissingExtraError(
            "the toolkit is not installed; pip install 'pocketvlm[executorch]' brings it"
        )


def register_operators() -> None:
    """Makes the toolkit know the operators that programs of this package use.

    Raises:
        MissingExtraError: ExecuTorch is not installed.
    """
    require_executorch()
    with quiet_terminal(), warnings.catch_warnings():
        # Its modules warn about each other's versions when they are imported.
        warnings.simplefilter("ignore")
        import executorch.kernels.quantized  # noqa: F401  (quantized_decomposed::*)
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (llama::*)


def find_program(bundle: Bundle) -> Path:
    """The program of a bundle, if this host can run it.

    Raises:
        MissingExtraError: ExecuTorch is not installed.
        BundleError: There is none, it is cut off, or the runtime is too old for it.
    """
    component = bundle.component("executorch", "decoder")
    require_executorch()
    require_runtime(bundle, "executorch", metadata.version("executorch"))
    file = bundle.file(component.file)
    _require_whole(file)
    return file


def load_program(file: Path) -> Any:
    """Loads a `.pte` file; its methods are run by `run_method(name, inputs)`.

    Raises:
        MissingExtraError: ExecuTorch is not installed.
        BundleError: The file is missing, damaged, or needs what this runtime lacks.
    """
    _require_whole(file)
    require_executorch()
    with quiet_terminal():
        runtime = _runtime()
        runtime._threadpool_get_thread_count()  # noqa: SLF001  (looks at the processor, and says so)
        try:
            # The only one of its loaders that gives attention scratch memory.
            return runtime._load_for_executorch(str(file))  # noqa: SLF001
        except RuntimeError as error:
            first_line = str(error).strip().partition("\n")[0]
            raise BundleError(f"{file}: ExecuTorch cannot load it: {first_line}") from error


def set_threads(threads: int) -> None:
    """Sets the threads of the kernels, for the whole process."""
    with quiet_terminal():
        _runtime()._unsafe_reset_threadpool(threads)  # noqa: SLF001  (there is no other way)


def _runtime() -> Any:
    """The runtime with the operators of this package's programs, and without the toolkit.

    The modules that belong to these libraries import compilers on the way, which takes seconds.
    """
    import torch  # what the libraries are linked against

    package = importlib.util.find_spec("executorch")
    assert package is not None  # noqa: S101  (`require_executorch` was asked)
    runtime = importlib.import_module("executorch.extension.pybindings._portable_lib")
    for folder in package.submodule_search_locations or ():
        for pattern in (
            "extension/llm/custom_ops/*custom_ops_aot_lib.*",
            "kernels/quantized/*quantized_ops_aot_lib.*",
        ):
            for library in Path(folder).glob(pattern):
                torch.ops.load_library(library)
    return runtime


def _require_whole(file: Path) -> None:
    """Refuses what the runtime would read beyond its end, which can end the process.

    Raises:
        BundleError: The file is missing, cut off, or no program.
    """
    if not file.is_file():
        raise BundleError(f"{file}: is missing")
    with file.open("rb") as stream:
        start = stream.read(PROGRAM_HEADER_START + PROGRAM_HEADER.size)
    if len(start) < PROGRAM_HEADER_START + PROGRAM_HEADER.size or start[4:6] != b"ET":
        raise BundleError(f"{file}: is not an ExecuTorch program")
    magic, _, _, base, size = PROGRAM_HEADER.unpack_from(start, PROGRAM_HEADER_START)
    found = file.stat().st_size
    if magic == _MAGIC and found < base + size:
        raise BundleError(f"{file}: is cut off: {found} bytes of {base + size}")
