"""Runs a bundle's ExecuTorch program, whose KV cache lies inside the program.

The program's methods hand each other rows (`get_model_schema` describes them). Where rotary
positions have gaps, a row tells its own position: `offset` and `advance` behind the embedding.
A `Runner` is told every position by its caller, so this one counts rows itself, with an advance of
1 each, and writes into `offset` how far the wanted position is from that count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError, InputError
from pocketvlm.runtime.executorch.program import load_program, open_program
from pocketvlm.runtime.native_output import quiet_terminal
from pocketvlm.runtime.runner import Runner

__all__ = ["ExecutorchRunner"]

_METHODS = frozenset({"vision_encoder", "token_embedding", "text_decoder", "get_model_schema"})


class ExecutorchRunner(Runner):
    """A bundle's `model.pte` on this machine's CPU."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Loads the program; its capacity was fixed when it was exported.

        Args:
            bundle: An opened bundle.
            threads: Threads of the kernels, for the whole process; `None` leaves them as they are.

        Raises:
            MissingExtraError: ExecuTorch is not installed.
            BundleError: The bundle has no program, or it does not load or is another one.
        """
        file = bundle.file(bundle.component("executorch", "decoder").file)
        self._file = file
        with open_program(bundle) as (program, self.expand_ms):
            self._module = load_program(program, file)
        try:
            missing = sorted(_METHODS - set(self._module.method_names()))
        except RuntimeError as error:  # the file is read further than when it was loaded
            first_line = str(error).strip().partition("\n")[0]
            raise BundleError(f"{file}: ExecuTorch cannot load it: {first_line}") from error
        if missing:
            raise BundleError(f"{file}: has no method {missing[0]}")
        if threads is not None:
            _set_threads(threads)
        schema = json.loads(self._call("get_model_schema")[0])
        super().__init__(capacity=int(schema["max_context_len"]))
        self._channels = int(schema["row_channels"])
        self._width = int(schema["hidden_size"])

    def encode_image(
        self, pixels: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Pixels [1, C, S, S] to embeddings [1, k, width] and indices [1, k]."""
        rows, indices = self._call("vision_encoder", pixels)
        return rows.numpy()[..., : self._width].copy(), indices.numpy().copy()

    def embed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Token ids to embeddings [1, L, width]."""
        ids = np.asarray(token_ids, np.int64)[None]
        # A program plans memory for `capacity` ids; a caller may ask for more at once.
        parts = [
            self._call("token_embedding", ids[:, start : start + self.capacity])[0]
            .numpy()[..., : self._width]
            .copy()
            for start in range(0, ids.shape[1], self.capacity)
        ]
        embeds: npt.NDArray[np.float32] = np.concatenate(parts, axis=1)
        return embeds

    def decode(
        self,
        embeds: npt.NDArray[np.float32],
        position_ids: npt.NDArray[np.int64],
        is_visual: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Runs L rows behind those in the cache and returns the last one's logits.

        Raises:
            InputError: The cache has no room for L more rows, or the program counts positions row
                by row and the given ones are not.
        """
        count = embeds.shape[1]
        self._require_room(count)
        counted = np.arange(self._length, self._length + count)
        rows = embeds
        if self._channels > self._width:
            rows = np.empty((1, count, self._channels), np.float32)
            rows[..., : self._width] = embeds
            rows[0, :, self._width] = position_ids[0] - counted
            rows[0, :, self._width + 1] = 1.0
        elif not np.array_equal(position_ids[0], counted):
            raise InputError(
                "this ExecuTorch program counts positions row by row, and the given ones have gaps"
            )
        start = np.array([self._length], np.int64)
        (logits,) = self._call("text_decoder", rows, start)
        self._length += count
        values: npt.NDArray[np.float32] = logits.numpy()[0, -1]
        return values

    def _call(self, method: str, *arrays: npt.NDArray[Any]) -> Sequence[Any]:
        import torch

        inputs = tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        try:
            outputs: Sequence[Any] = self._module.run_method(method, inputs, clone_outputs=False)
        except RuntimeError as error:
            first_line = str(error).strip().partition("\n")[0]
            raise BundleError(f"{self._file}: {method} does not run: {first_line}") from error
        return outputs


def _set_threads(threads: int) -> None:
    from executorch.extension.pybindings import portable_lib

    with quiet_terminal():
        portable_lib._unsafe_reset_threadpool(threads)  # noqa: SLF001  (there is no other way)
