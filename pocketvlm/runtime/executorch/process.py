"""Runs an ExecuTorch program in a separate process, because its runtime trusts the file.

ExecuTorch checks a program less than it should: a damaged or hostile one makes it read and write
out of bounds, which crashes the process. Here that process is not this one. A result is accepted
only if it has the type and shape that were asked for; a crash, a timeout or anything else is one
line that names the file.
"""

from __future__ import annotations

import math
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle
from pocketvlm.child_process import module_command, start_child
from pocketvlm.errors import BundleError
from pocketvlm.runtime.executorch.frames import (
    ArrayType,
    FrameError,
    array_types,
    read_arrays,
    read_header,
    write_frame,
)
from pocketvlm.runtime.executorch.program import find_program

__all__ = ["ProgramProcess", "UnspeakablePieceError"]

_LOAD_LIMIT_S = 600.0
_RUN_LIMIT_S = 1800.0
_END_LIMIT_S = 10.0
_POLL_S = 0.5
_MOST_WORDS = 500


class UnspeakablePieceError(ValueError):
    """A token of the answer is part of a character, which the binding cannot pass on."""


class ProgramProcess:
    """A process that has loaded a bundle's program.

    Attributes:
        file: The program.
        methods: The program's methods.
        schema: The result of `get_model_schema`; `None` if there is no such method.
        pid: The process.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        load_limit_s: float = _LOAD_LIMIT_S,
        run_limit_s: float = _RUN_LIMIT_S,
    ) -> None:
        """Starts the process and waits until it has loaded the program.

        Args:
            bundle: An opened bundle.
            threads: Threads of the kernels; `None` leaves them as they are.
            load_limit_s: The longest wait for the program.
            run_limit_s: The longest wait for a method, or for the next piece of an answer.

        Raises:
            MissingExtraError: ExecuTorch is not installed.
            BundleError: The bundle has no program, or it does not load.
        """
        self.file = find_program(bundle)
        self._run_limit_s = run_limit_s
        with ExitStack() as started:
            child = started.enter_context(
                start_child(
                    module_command("pocketvlm.runtime.executorch.worker"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            )
            assert child.stdin is not None  # noqa: S101  (asked for above)
            assert child.stdout is not None  # noqa: S101
            self._watch = _Watch(child)
            started.callback(self._watch.end)
            self._watch.start()
            self._child, self.pid = child, child.pid
            self._calls, self._answers = child.stdin.fileno(), child.stdout.fileno()
            self._close = weakref.finalize(self, started.pop_all().close)
        try:
            call = {"file": str(self.file), "threads": threads}
            loaded = self._exchange("loading it", load_limit_s, call, (), ())[0]
            self.methods, self.schema = self._loaded(loaded)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process."""
        self._close()

    def run(
        self, method: str, *arrays: npt.NDArray[Any], outputs: Sequence[ArrayType]
    ) -> list[npt.NDArray[Any]]:
        """Runs a method.

        Args:
            method: Its name.
            arrays: What it takes.
            outputs: What it must return.

        Raises:
            BundleError: It does not run, or returns something else.
        """
        call = {"call": "run", "method": method}
        return self._exchange(f"running {method}", self._run_limit_s, call, arrays, outputs)[1]

    def generate(
        self,
        tokenizer: str,
        parts: Sequence[Sequence[int] | npt.NDArray[np.float32]],
        *,
        max_new_tokens: int,
        on_piece: Callable[[str], None],
    ) -> None:
        """Answers with ExecuTorch's own `MultimodalRunner`.

        Args:
            tokenizer: File of the tokenizer.
            parts: The prompt, in order: token ids, and pixels of pictures.
            max_new_tokens: Tokens after which the answer is cut.
            on_piece: Called with the text of each token.

        Raises:
            BundleError: The program does not run.
            UnspeakablePieceError: A token is part of a character.
        """
        pictures = [part for part in parts if isinstance(part, np.ndarray)]
        call: dict[str, Any] | None = {
            "call": "generate",
            "tokenizer": tokenizer,
            "parts": [None if isinstance(part, np.ndarray) else list(part) for part in parts],
            "max_new_tokens": max_new_tokens,
        }
        for _ in range(max_new_tokens + 1):
            what = "running MultimodalRunner"
            header, _ = self._exchange(what, self._run_limit_s, call, pictures, ())
            if "unspeakable" in header:
                raise UnspeakablePieceError(f"{self.file}: a token is part of a character")
            piece = header.get("piece")
            if not isinstance(piece, str):
                return
            call = None
            try:
                on_piece(piece)
            except BaseException:
                self.close()  # it keeps sending, and nothing reads it
                raise
        self.close()
        raise BundleError(f"{self.file}: MultimodalRunner said more than {max_new_tokens} tokens")

    def _loaded(self, header: Mapping[str, Any]) -> tuple[frozenset[str], str | None]:
        match header:
            case {"methods": [*methods], "schema": (str() | None) as schema} if all(
                isinstance(name, str) for name in methods
            ):
                return frozenset(methods), schema
        raise BundleError(f"{self.file}: ExecuTorch's process did not say what it loaded")

    def _exchange(
        self,
        doing: str,
        limit_s: float,
        call: Mapping[str, Any] | None,
        arrays: Sequence[npt.NDArray[Any]],
        outputs: Sequence[ArrayType],
    ) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
        """Sends a call, if there is one, and takes the next answer."""
        with self._bounded(doing, limit_s):
            if call is not None:
                write_frame(self._calls, call, arrays)
            header = read_header(self._answers)
            if header is None:
                raise EOFError
            found = array_types(header)
            is_right = found == list(outputs)
            results = read_arrays(self._answers, found) if is_right else []
        if "error" in header:
            raise BundleError(self._named(str(header["error"])))
        if not is_right:
            self.close()  # what it would send is not read
            said, wanted = (", ".join(map(str, types)) or "nothing" for types in (found, outputs))
            raise BundleError(
                f"{self.file}: {doing} returned {said[:_MOST_WORDS]}; this bundle needs {wanted}"
            )
        return header, results

    def _named(self, words: str) -> str:
        """The process's complaint, as one line that always names the file."""
        line = words.partition("\n")[0][: _MOST_WORDS + len(str(self.file))]
        return line if str(self.file) in line else f"{self.file}: {line}"

    @contextmanager
    def _bounded(self, doing: str, limit_s: float) -> Iterator[None]:
        """Turns a crash, a timeout and invalid answers into one line each."""
        if not self._close.alive:
            raise BundleError(f"{self.file}: ExecuTorch's process has ended; open the bundle again")
        self._watch.deadline = time.monotonic() + limit_s
        try:
            yield
        except (EOFError, OSError) as error:
            ended = f"ended {self._ending()}"
            how = f"did not answer within {limit_s:g} s" if self._watch.is_late else ended
            self.close()
            raise BundleError(f"{self.file}: ExecuTorch {how} while {doing}") from error
        except FrameError as error:
            self.close()
            raise BundleError(
                f"{self.file}: ExecuTorch answered nonsense while {doing}: {error}"
            ) from error
        except BaseException:
            self.close()  # the next answer would be mistaken for another one
            raise
        finally:
            self._watch.deadline = math.inf

    def _ending(self) -> str:
        try:
            code = self._child.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            return "the connection"
        if code >= 0:
            return f"with code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        hint = " (the system kills so when memory runs out)" if name == "SIGKILL" else ""
        return f"with signal {name}{hint}"


class _Watch(threading.Thread):
    """Ends a process that does not answer in time; a timer per call would cost more."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.deadline = math.inf
        self.is_late = False
        self._child = child
        self._is_over = threading.Event()

    def run(self) -> None:
        """Watches the clock until `end`."""
        while not self._is_over.wait(_POLL_S):
            if time.monotonic() > self.deadline:
                self.is_late = True
                self._child.kill()
                return

    def end(self) -> None:
        """Stops watching."""
        self._is_over.set()
