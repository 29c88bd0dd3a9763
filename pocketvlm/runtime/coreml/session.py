"""Asks a worker process to run Core ML, and accepts only a complete answer.

A model that Core ML cannot compile may end its process with a signal, or end it with exit code 0
and no result, or never return. Each of these is a failure here, with the last line of the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle
from pocketvlm.child_process import module_command
from pocketvlm.emulation.mil.types import Array
from pocketvlm.errors import CheckFailedError
from pocketvlm.json_io import parse_json
from pocketvlm.runtime.coreml.frames import FRAME_HEADER, decode_frame, encode_frame
from pocketvlm.runtime.runner import Runner

__all__ = ["WORKER", "RemoteRunner", "measure_function"]

WORKER: tuple[str, ...] = tuple(module_command("pocketvlm.runtime.coreml.worker"))
"""The command, to which a request's file is appended."""

TIMEOUT_S = 900.0
"""The longest wait for one answer; the first one compiles the package."""

_SAMPLES = ("load_ms", "predict_ms")


def measure_function(
    package: Path,
    function: str | None,
    *,
    units: str,
    iterations: int,
    worker: Sequence[str] = WORKER,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """Times one function and reads its compute plan, in a separate process.

    Returns:
        `engine`, raw samples `load_ms` and `predict_ms`, and `plan`, one row per operator.

    Raises:
        CheckFailedError: The process ended, or was ended, without a complete result.
    """
    what = f"Core ML, measuring {package.name}" + (f", function {function}" if function else "")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        request = {
            "job": "measure",
            "package": str(package),
            "function": function,
            "units": units,
            "iterations": iterations,
            "result": str(result),
        }
        command = [*worker, _write(folder, request)]
        try:
            finished = subprocess.run(  # noqa: S603  (the command is ours)
                command, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CheckFailedError(f"{what}: no answer within {timeout_s:g} s") from error
        return _read_result(result, f"{what}: {_ending(finished.returncode, finished.stderr)}")


def _read_result(file: Path, what: str) -> dict[str, Any]:
    """Reads a result, which must be complete."""
    try:
        document = parse_json(file.read_bytes(), "its result", error=ValueError)
        complete = all(
            document[name] and all(isinstance(value, int | float) for value in document[name])
            for name in _SAMPLES
        ) and all({"operator", "device", "cost"} <= row.keys() for row in document["plan"])
    except OSError as error:
        raise CheckFailedError(f"{what}, and left no result") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckFailedError(f"{what}, and its result cannot be read: {error!r}") from error
    if not complete:
        raise CheckFailedError(f"{what}, and its result is not complete")
    found: dict[str, Any] = document
    return found


class RemoteRunner(Runner):
    """A `CoremlRunner` in a separate process.

    Raises:
        CheckFailedError: From any call, when the process does not answer.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        units: str,
        worker: Sequence[str] = WORKER,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Starts the process and waits until it has opened the packages.

        Args:
            bundle: An opened bundle.
            units: What Core ML may use, one of `apple.COMPUTE_UNITS`.
            worker: The command of the worker.
            timeout_s: The longest wait for one answer.
        """
        # The process opens the whole bundle, of which this one may be given a part.
        self._first_variant = bundle.component("coreml", "vision").variant
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory()
        self._log = (Path(self._folder.name) / "stderr.txt").open("w+b")
        calls, self._calls = os.pipe()
        self._answers, answers = os.pipe()
        request = {
            "job": "serve",
            "bundle": str(bundle.path),
            "units": units,
            "calls": calls,
            "answers": answers,
        }
        self._process = subprocess.Popen(  # noqa: S603  (the command is ours)
            [*worker, _write(self._folder.name, request)],
            stdout=self._log,
            stderr=self._log,
            pass_fds=(calls, answers),
        )
        os.close(calls)
        os.close(answers)
        try:
            hello = self._receive("opening the packages", "capacity", "engine")
        except CheckFailedError:
            self.close()
            raise
        super().__init__(capacity=int(hello["capacity"]))
        self.engine = str(hello["engine"])

    def encode_image(
        self, pixels: npt.NDArray[np.float32], variant: str | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Pixels [1, C, S, S] to embeddings [1, k, width] and indices [1, k]."""
        arrays = {"pixels": pixels}
        name = variant or self._first_variant
        if name is not None:
            arrays["variant"] = np.array(name)
        found = self._ask("encode_image", arrays, "embeds", "indices")
        return found["embeds"], found["indices"]

    def embed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Token ids to embeddings [1, L, width]."""
        return self._ask("embed", {"token_ids": np.array(token_ids, np.int64)}, "embeds")["embeds"]

    def decode(
        self,
        embeds: npt.NDArray[np.float32],
        position_ids: npt.NDArray[np.int64],
        is_visual: npt.NDArray[np.bool_] | None = None,
        mutual: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Runs L rows after those in the cache and returns the last one's logits."""
        rows = embeds.shape[1]
        self._require_room(rows)
        arrays: dict[str, Array] = {
            "embeds": embeds,
            "position_ids": position_ids,
        }
        if mutual is not None:
            arrays["mutual"] = mutual
        logits = self._ask("decode", arrays, "logits")["logits"]
        self._length += rows
        return logits

    def truncate(self, length: int) -> int:
        """Forgets every row from `length` on; the process says how many are left."""
        left = np.array(super().truncate(length))
        self._length = int(self._ask("truncate", {"length": left}, "length")["length"])
        return self._length

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._calls, self._answers):
            with contextlib.suppress(OSError):
                os.close(pipe)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def _ask(self, call: str, arrays: Mapping[str, Array], *expected: str) -> dict[str, Array]:
        data = memoryview(encode_frame({"call": np.array(call), **arrays}))
        try:
            while data:
                data = data[os.write(self._calls, data) :]
        except BrokenPipeError:
            raise CheckFailedError(self._explain(call)) from None
        return self._receive(call, *expected)

    def _receive(self, call: str, *expected: str) -> dict[str, Array]:
        deadline = time.monotonic() + self._timeout_s
        (size,) = FRAME_HEADER.unpack(self._read(FRAME_HEADER.size, deadline, call))
        try:
            arrays = decode_frame(self._read(size, deadline, call))
        except ValueError as error:
            raise CheckFailedError(f"Core ML, {call}: {error}") from error
        if arrays.keys() != set(expected):
            raise CheckFailedError(f"Core ML, {call}: answered with {', '.join(arrays)}")
        return arrays

    def _read(self, size: int, deadline: float, call: str) -> bytes:
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while len(data) < size:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    self._process.kill()
                    raise CheckFailedError(
                        f"Core ML, {call}: no answer within {self._timeout_s:g} s"
                    )
                part = os.read(self._answers, size - len(data))
                if not part:
                    raise CheckFailedError(self._explain(call))
                data += part
        return bytes(data)

    def _explain(self, call: str) -> str:
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")
        return f"Core ML, {call}: {_ending(code, said)}, and left no answer"


def _write(folder: str, request: Mapping[str, Any]) -> str:
    file = Path(folder) / "request.json"
    file.write_text(json.dumps(request), encoding="utf-8")
    return str(file)


def _ending(code: int, said: str) -> str:
    """How a process ended, and its last line."""
    lines = said.strip().splitlines()
    how = (
        f"the process was ended by signal {-code}" if code < 0 else f"the process ended with {code}"
    )
    return f"{how} ({lines[-1].strip()})" if lines else how
