"""Runs a bundle's ExecuTorch program, whose KV cache lies inside the program.

The program's methods hand each other rows (`get_model_schema` describes them). Where rotary
positions have gaps, a row states its own position: `offset` and `advance` after the embedding.
A `Runner` is told every position by its caller, so this one counts rows itself, with an advance of
1 each, and writes into `offset` how far the wanted position is from that count. The program itself
runs in another process (`process`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle, TensorSignature
from pocketvlm.errors import BundleError, InputError
from pocketvlm.json_io import DecodeError, decode, parse_json
from pocketvlm.runtime.executorch.frames import ArrayType
from pocketvlm.runtime.executorch.process import ProgramProcess
from pocketvlm.runtime.runner import Runner

__all__ = ["ExecutorchRunner"]

_VISION = "vision_encoder"
_METHODS = {_VISION, "token_embedding", "text_decoder", "get_model_schema"}
_MAX_CAPACITY = 2**24
_MOST_CHANNELS = 5
"""Four of a row's position along three axes, and one of the rows that it sees beside the past."""


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The sizes that a runner reads from a program's schema."""

    max_context_len: int
    row_channels: int
    hidden_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_context_len <= _MAX_CAPACITY:
            raise ValueError(f"max_context_len must be 1 to {_MAX_CAPACITY:,}")
        if self.hidden_size < 1 or not 0 <= self.row_channels - self.hidden_size <= _MOST_CHANNELS:
            raise ValueError(f"row_channels must be hidden_size, or up to {_MOST_CHANNELS} more")


class ExecutorchRunner(Runner):
    """A bundle's `model.pte` on this machine's CPU.

    Attributes:
        process: The process that the program runs in; it ends when this runner is closed or gone.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Loads the program; its capacity was fixed when it was exported.

        Args:
            bundle: An opened bundle.
            threads: Threads of the kernels; `None` leaves them as they are.

        Raises:
            MissingExtraError: ExecuTorch is not installed.
            BundleError: The bundle has no program, or it does not load or is another one.
        """
        vocabulary = _vocabulary(bundle)
        self.process = ProgramProcess(bundle, threads=threads)
        try:
            sizes = _read_sizes(self.process)
        except BundleError:
            self.close()
            raise
        super().__init__(capacity=sizes.max_context_len)
        self._channels = sizes.row_channels
        self._width = sizes.hidden_size
        self._has_mutual = bundle.manifest.kv_cache.mutual_rows is not None
        self._bundle = bundle
        self._tokens: dict[str | None, int] = {None: bundle.manifest.visual_tokens} | {
            each.name: each.visual_tokens for each in bundle.manifest.variants
        }
        self._logits = ArrayType("float32", (1, 1, vocabulary))

    def close(self) -> None:
        """Ends the process; no more calls are answered."""
        self.process.close()

    def encode_image(
        self, pixels: npt.NDArray[np.float32], variant: str | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Pixels [1, C, S, S] to embeddings [1, k, width] and indices [1, k]."""
        component = self._bundle.component("executorch", "vision", variant=variant)
        kept = self._tokens[variant]
        rows, indices = self.process.run(
            component.function or _VISION,
            pixels,
            outputs=(self._rows(kept), ArrayType("int64", (1, kept))),
        )
        return rows[..., : self._width].copy(), indices

    def embed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Token ids to embeddings [1, L, width]."""
        ids = np.asarray(token_ids, np.int64)[None]
        # A program plans memory for `capacity` ids; a caller may ask for more at once.
        parts = []
        for start in range(0, ids.shape[1], self.capacity):
            part = ids[:, start : start + self.capacity]
            outputs = (self._rows(part.shape[1]),)
            (rows,) = self.process.run("token_embedding", part, outputs=outputs)
            parts.append(rows[..., : self._width])
        embeds: npt.NDArray[np.float32] = np.concatenate(parts, axis=1)
        return embeds

    def decode(
        self,
        embeds: npt.NDArray[np.float32],
        position_ids: npt.NDArray[np.int64],
        is_visual: npt.NDArray[np.bool_] | None = None,
        mutual: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Runs L rows after those in the cache and returns the last one's logits.

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
        told = self._channels - self._width - self._has_mutual
        if self._has_mutual:
            rows[0, :, -1] = -1 if mutual is None else mutual
        if told:
            last = self._width + told - 1
            rows[0, :, self._width : last] = (position_ids - counted).T
            rows[0, :, last] = 1.0
        elif not np.array_equal(position_ids[0], counted):
            raise InputError(
                "this ExecuTorch program counts positions row by row, and the given ones have gaps"
            )
        start = np.array([self._length], np.int64)
        (logits,) = self.process.run("text_decoder", rows, start, outputs=(self._logits,))
        self._advance(count)
        values: npt.NDArray[np.float32] = logits[0, -1]
        return values

    def _rows(self, count: int) -> ArrayType:
        return ArrayType("float32", (1, count, self._channels))


def _vocabulary(bundle: Bundle) -> int:
    """How many logits the manifest says that the program returns.

    Raises:
        BundleError: It does not say so.
    """
    match bundle.component("executorch", "decoder").outputs:
        case [TensorSignature(shape=(1, 1, int(vocabulary)))] if vocabulary > 0:
            return vocabulary
    raise BundleError(
        f"{bundle.path}: manifest.json does not say that the executorch decoder returns logits of "
        "shape [1, 1, vocabulary]"
    )


def _read_sizes(process: ProgramProcess) -> _Sizes:
    """Reads the sizes in a program's schema.

    Raises:
        BundleError: It is another program than those of this package.
    """
    if missing := sorted(_METHODS - process.methods):
        raise BundleError(f"{process.file}: has no method {missing[0]}")
    where = f"{process.file}: get_model_schema"
    document = parse_json(process.schema or "", where, error=BundleError)
    if not isinstance(document, dict):
        raise BundleError(f"{where}: is not an object")
    known = {name: document.get(name) for name in _Sizes.__dataclass_fields__}
    try:
        return decode(_Sizes, known)
    except DecodeError as error:
        raise BundleError(f"{where}: {error}") from error
