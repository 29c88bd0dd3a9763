"""Loads an ExecuTorch program with the pip package's own runtime.

That runtime takes and returns torch tensors, so torch is imported here, when a program is loaded
and not before: on a phone the same file is run by ExecuTorch's C++, Swift or Kotlin runtime,
without torch. The import contract names this exception.
"""

from __future__ import annotations

import importlib.util
import struct
import warnings
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, MissingExtraError
from pocketvlm.runtime.native_output import quiet_terminal
from pocketvlm.runtime.sparse_file import expanded_path, plain_path
from pocketvlm.runtime.versions import require_runtime

__all__ = [
    "PROGRAM_HEADER",
    "PROGRAM_HEADER_START",
    "load_program",
    "open_program",
    "register_operators",
    "require_executorch",
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
    """Makes the runtime know the operators that programs of this package use.

    Raises:
        MissingExtraError: ExecuTorch is not installed.
    """
    require_executorch()
    with quiet_terminal(), warnings.catch_warnings():
        # Its modules warn about each other's versions when they are imported.
        warnings.simplefilter("ignore")
        import executorch.kernels.quantized  # noqa: F401  (quantized_decomposed::*)
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (llama::*)


def open_program(bundle: Bundle) -> AbstractContextManager[tuple[Path, float | None]]:
    """The `.pte` file of a bundle for as long as the block lasts, expanded where it is packed.

    What was loaded in the block stays. The number is the milliseconds that expanding took.

    Raises:
        MissingExtraError: ExecuTorch is not installed.
        BundleError: There is none, its packed file is damaged, or the runtime is too old for it.
    """
    component = bundle.component("executorch", "decoder")
    require_executorch()
    require_runtime(bundle, "executorch", metadata.version("executorch"))
    if component.sparse_file is None:
        return plain_path(bundle.file(component.file))
    return expanded_path(bundle.file(component.sparse_file))


def load_program(file: Path, name: Path | None = None) -> Any:
    """Loads a `.pte` file; its methods are run by `run_method(name, inputs)`.

    Args:
        file: The file.
        name: What messages call it, where its bytes were expanded from another one.

    Raises:
        MissingExtraError: ExecuTorch is not installed.
        BundleError: The file is missing, damaged, or needs what this runtime lacks.
    """
    name = name or file
    _require_whole(file, name)
    register_operators()
    from executorch.extension.pybindings import portable_lib

    with quiet_terminal():
        portable_lib._threadpool_get_thread_count()  # noqa: SLF001  (looks at the processor, and says so)
        try:
            # The only one of its loaders that gives attention scratch memory.
            return portable_lib._load_for_executorch(str(file))  # noqa: SLF001
        except RuntimeError as error:
            first_line = str(error).strip().partition("\n")[0]
            raise BundleError(f"{name}: ExecuTorch cannot load it: {first_line}") from error


def _require_whole(file: Path, name: Path) -> None:
    """Refuses what the runtime would read beyond its end, which can end the process.

    Raises:
        BundleError: The file is missing, cut off, or no program.
    """
    if not file.is_file():
        raise BundleError(f"{name}: is missing")
    with file.open("rb") as stream:
        start = stream.read(PROGRAM_HEADER_START + PROGRAM_HEADER.size)
    if len(start) < PROGRAM_HEADER_START + PROGRAM_HEADER.size or start[4:6] != b"ET":
        raise BundleError(f"{name}: is no ExecuTorch program")
    magic, _, _, base, size = PROGRAM_HEADER.unpack_from(start, PROGRAM_HEADER_START)
    found = file.stat().st_size
    if magic == _MAGIC and found < base + size:
        raise BundleError(f"{name}: is cut off: {found} bytes of {base + size}")
