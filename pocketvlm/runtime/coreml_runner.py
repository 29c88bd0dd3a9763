"""Runs a bundle's Core ML packages as an app does: a padded prefill in chunks, then row by row.

By default the packages are computed by the project's reference evaluator, which is not Core ML;
on an Apple machine the same runner drives the real runtime (`pocketvlm verify-coreml`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle
from pocketvlm.errors import BundleError
from pocketvlm.runtime.coreml_package import ComputedPackage, OpenPackage, ReferencePackage
from pocketvlm.runtime.mil_types import Array
from pocketvlm.runtime.runner import Runner

__all__ = ["CoremlRunner"]

_TARGET = "coreml"
_CACHE_INPUTS = ("key_cache", "value_cache")


class CoremlRunner(Runner):
    """A bundle's Core ML packages, with the KV cache inside.

    Attributes:
        chunk: Rows of one prefill.
    """

    def __init__(self, bundle: Bundle, *, open_package: OpenPackage = ReferencePackage) -> None:
        """Opens the packages.

        Args:
            bundle: An opened bundle.
            open_package: What computes them: the reference evaluator, unless told otherwise.

        Raises:
            BundleError: The bundle has no Core ML packages, or one is damaged or does not match.
        """
        self._open_package = open_package
        self._opened: dict[str, ComputedPackage] = {}
        self._bundle = bundle
        self._vision = self._open("vision")
        self._embedding = self._open("embedding")
        self._decoder = self._open("decoder")
        described = self._decoder.described
        prefill, decode = described.function("prefill"), described.function("decode")
        self.chunk = _fixed(self._bundle, "embeds", prefill.input_shape("embeds")[1])
        cache = prefill.input_shape("key_cache")
        super().__init__(capacity=_fixed(self._bundle, "key_cache", cache[-2]))
        known = {"embeds", "position_ids", "past_length", *_CACHE_INPUTS}
        names = {parameter.name for parameter in prefill.inputs}
        if not known <= names or len(names - known) > 1:
            raise BundleError(
                f"{described.path}: prefill takes {', '.join(sorted(names))}; expected are "
                f"{', '.join(sorted(known))} and a count of rows"
            )
        self._count_name = next(iter(names - known), None)
        held = [p.name for p in decode.inputs if p.name in _CACHE_INPUTS and not p.is_state]
        self._carried: dict[str, Array] = {
            name: np.zeros([size or 1 for size in decode.input_shape(name)], np.float32)
            for name in held
        }
        length = self._embedding.described.function("embedding").input_shape("input_ids")[1]
        self._embed_length = length

    def encode_image(
        self, pixels: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Pixels [1, C, S, S] to embeddings [1, k, width] and indices [1, k]."""
        outputs = self._vision.predict("vision", {"pixel_values": pixels})
        return outputs["embeds"], outputs["indices"].astype(np.int64)

    def embed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Token ids to embeddings [1, L, width]."""
        ids = np.asarray(token_ids, np.int32)[None]
        size = self._embed_length or ids.shape[1]
        parts = []
        for start in range(0, ids.shape[1], size):
            part = ids[:, start : start + size]
            padded = np.pad(part, ((0, 0), (0, size - part.shape[1])))
            embeds = self._embedding.predict("embedding", {"input_ids": padded})["embeds"]
            parts.append(embeds[:, : part.shape[1]])
        return np.concatenate(parts, axis=1)

    def decode(
        self, embeds: npt.NDArray[np.float32], position_ids: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Runs L rows, writes them to the cache, and returns the last one's logits.

        Prefill writes a whole chunk of rows, padding included; what stands behind the rows that
        are real is overwritten by the next ones. Where a chunk no longer fits, rows go one by one.
        """
        rows = embeds.shape[1]
        self._require_room(rows)
        done = 0
        logits = np.zeros(0, np.float32)
        while done < rows:
            fits = self._length + self.chunk <= self.capacity
            count = min(self.chunk, rows - done) if fits and rows - done > 1 else 1
            part = slice(done, done + count)
            logits = self._run(embeds[:, part], position_ids[:, part])
            self._length += count
            done += count
        return logits

    def _run(
        self, embeds: npt.NDArray[np.float32], position_ids: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        rows = embeds.shape[1]
        function = "decode" if rows == 1 else "prefill"
        padding = 0 if rows == 1 else self.chunk - rows
        inputs: dict[str, Array] = {
            "embeds": np.pad(embeds, ((0, 0), (0, padding), (0, 0))),
            "position_ids": np.pad(position_ids, ((0, 0), (0, padding))).astype(np.int32),
            "past_length": np.array([self._length], np.int32),
            **self._carried,
        }
        if self._count_name is not None and function == "prefill":
            inputs[self._count_name] = np.array([rows], np.int32)
        outputs = self._decoder.predict(function, inputs)
        for name in self._carried:
            self._carried[name] = outputs[f"{name}_out"]
        logits: npt.NDArray[np.float32] = outputs["logits"][0, -1]
        return logits

    def _open(self, role: str) -> ComputedPackage:
        """Packages are opened once, however many roles they have."""
        file = self._bundle.component(_TARGET, role).file
        if file not in self._opened:
            self._opened[file] = self._open_package(self._bundle.path / file)
        return self._opened[file]


def _fixed(bundle: Bundle, name: str, size: int | None) -> int:
    if size is None:
        raise BundleError(f"{bundle.path}: the length of {name!r} is not fixed")
    return size
