"""The process that a program runs in: `python -m pocketvlm.runtime.executorch.worker`.

The first call loads a program, the others run its methods or answer by `MultimodalRunner`. They
come by standard input, and answers go by standard output, which is kept for them: native code
writes to descriptors 1 and 2 as it likes. ExecuTorch's Python runtime takes torch tensors, so torch
is imported here, and only here. On a phone the same file is run without it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt

from pocketvlm.child_process import end_process, end_with_parent
from pocketvlm.errors import BundleError, PocketVLMError
from pocketvlm.runtime.executorch.frames import array_types, read_arrays, read_header, write_frame
from pocketvlm.runtime.executorch.program import load_program, set_threads

__all__ = ["main"]

_SCHEMA = "get_model_schema"
_MAX_CALL_BYTES = 2**28  # the tokens of any prompt


def main() -> int:
    """Serves until the other side closes the pipe; returns the exit code."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    _write_no_core()
    calls, answers = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    service: _Service | None = None
    while (call := read_header(calls, max_bytes=_MAX_CALL_BYTES)) is not None:
        arrays = read_arrays(calls, array_types(call))
        found: Sequence[npt.NDArray[Any]] = ()
        answer: Mapping[str, Any] = {}
        doing = "load" if service is None else "run"
        try:
            if service is None:
                service = _Service(call, answers)
                answer = service.describe()
            elif call["call"] == "run":
                found = service.run(call["method"], arrays)
            else:
                answer = service.generate(call, arrays)
        except PocketVLMError as error:
            answer = {"error": str(error)}
        except BrokenPipeError:
            return 0
        except Exception as error:  # noqa: BLE001  (whatever the runtime raises is an answer)
            file = call["file"] if service is None else service.file
            answer = {"error": f"{file}: ExecuTorch cannot {doing} it: {_first_line(error)}"}
        write_frame(answers, answer, found)
    return 0


class _Service:
    """A loaded program."""

    def __init__(self, call: Mapping[str, Any], answers: int) -> None:
        self.file = Path(call["file"])
        self._answers = answers
        self._module = load_program(self.file)
        if call["threads"] is not None:
            set_threads(call["threads"])

    def describe(self) -> dict[str, Any]:
        """What the parent asks a program for."""
        methods = self._module.method_names()
        schema = self._module.run_method(_SCHEMA, ())[0] if _SCHEMA in methods else None
        said = schema if isinstance(schema, str) else None
        return {"methods": methods, "schema": said}

    def run(self, method: str, arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Runs a method; what it returns lies in the program's memory.

        Raises:
            BundleError: It does not run, or returns something other than tensors.
        """
        import torch

        inputs = tuple(torch.from_numpy(array) for array in arrays)
        try:
            outputs = self._module.run_method(method, inputs, clone_outputs=False)
            return [output.numpy() for output in outputs]
        except (RuntimeError, AttributeError, TypeError) as error:
            raise BundleError(
                f"{self.file}: {method} does not run: {_first_line(error)}"
            ) from error

    def generate(
        self, call: Mapping[str, Any], pictures: Sequence[npt.NDArray[Any]]
    ) -> dict[str, Any]:
        """Answers with `MultimodalRunner`, which loads the program itself.

        Raises:
            BundleError: It does not load or run.
        """
        import torch
        from executorch.extension.llm import runner as native

        images = iter(pictures)
        inputs = [
            native.make_image_input(torch.from_numpy(next(images)))
            if ids is None
            else native.make_token_input(ids)
            for ids in call["parts"]
        ]
        config = native.GenerationConfig(
            echo=False, max_new_tokens=call["max_new_tokens"], temperature=0.0, warming=True
        )
        try:
            runner = native.MultimodalRunner(str(self.file), call["tokenizer"], None)
            runner.generate(inputs, config, self._tell)
        except UnicodeDecodeError:  # a token that is part of a character
            return {"unspeakable": True}
        except RuntimeError as error:
            raise BundleError(
                f"{self.file}: MultimodalRunner cannot run it: {_first_line(error)}"
            ) from error
        return {}

    def _tell(self, piece: str) -> None:
        write_frame(self._answers, {"piece": piece})


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _write_no_core() -> None:
    """Keeps the system from writing a core dump of this process."""
    with suppress(ImportError):  # no such limit on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    end_process(main())
