"""Loads an ExecuTorch program with the pip package's own runtime.

That runtime takes and returns torch tensors, so torch is imported here, when a program is loaded
and not before: on a phone the same file is run by ExecuTorch's C++, Swift or Kotlin runtime,
without torch. The import contract names this exception.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from pocketvlm.errors import BundleError, MissingExtraError

__all__ = ["load_program", "require_executorch"]


def require_executorch() -> None:
    """Checks that the runtime is installed, without importing it.

    Raises:
        MissingExtraError: It is not.
    """
    if importlib.util.find_spec("executorch") is None:
        raise MissingExtraError(
            "the toolkit is not installed; pip install 'pocketvlm[executorch]' brings it"
        )


def load_program(file: Path) -> Any:
    """Loads a `.pte` file; its methods are run by `run_method(name, inputs)`.

    Raises:
        MissingExtraError: ExecuTorch is not installed.
        BundleError: The file is missing, damaged, or needs what this runtime lacks.
    """
    require_executorch()
    if not file.is_file():
        raise BundleError(f"{file}: is missing")
    with warnings.catch_warnings():
        # Its modules warn about each other's versions when they are imported.
        warnings.simplefilter("ignore")
        import executorch.kernels.quantized  # noqa: F401  (registers quantized_decomposed::*)
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::*)
        from executorch.extension.pybindings import portable_lib
    try:
        return portable_lib._load_for_executorch(str(file))  # noqa: SLF001  (the only loader with scratch memory for attention)
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise BundleError(f"{file}: ExecuTorch cannot load it: {first_line}") from error
