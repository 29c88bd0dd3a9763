"""Runs a bundle's Core ML packages as an app does: a padded prefill in chunks, then row by row.

By default the packages are computed by the project's reference evaluator, which is not Core ML;
on an Apple machine the same runner drives the real runtime (`pocketvlm verify-coreml`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketvlm.bundle import Bundle, Component
from pocketvlm.emulation.mil.package import Function
from pocketvlm.emulation.mil.types import Array
from pocketvlm.errors import BundleError, InputError
from pocketvlm.runtime.coreml.package import ComputedPackage, OpenPackage, ReferencePackage
from pocketvlm.runtime.runner import Runner, States
from pocketvlm.runtime.splice import whole_rows

__all__ = ["CoremlRunner"]

_TARGET = "coreml"
_MAIN = "main"
_CACHES = ("key_cache", "value_cache")
_CONV = "conv_state"
_ROWS = {"embeds", "position_ids", "past_length"}
_COUNT, _MUTUAL = "length", "mutual"


class CoremlRunner(Runner):
    """A bundle's Core ML packages, with the KV cache inside.

    The cache is a state of the decoder (iOS 18), or goes in and out of every call (iOS 17).

    Attributes:
        chunk: Rows of one prefill.
    """

    def __init__(self, bundle: Bundle, *, open_package: OpenPackage = ReferencePackage) -> None:
        """Opens the packages.

        Args:
            bundle: An opened bundle.
            open_package: Opens a package for a kind of computation; by default, the reference
                evaluator.

        Raises:
            BundleError: The bundle has no Core ML packages, or one is damaged or does not match.
        """
        opened: dict[str, ComputedPackage] = {}

        def entries(role: str) -> list[_Entry]:
            found = []
            bundle.component(_TARGET, role)  # lists what there is, if there is none
            for component in bundle.manifest.components:
                if (component.target, component.role) == (_TARGET, role):
                    if component.file not in opened:
                        opened[component.file] = open_package(bundle.path / component.file)
                    found.append(_Entry.open(component, opened[component.file]))
            return found

        self._bundle = bundle
        self._vision = {entry.function.name: entry for entry in entries("vision")}
        (self._embedding, *_) = entries("embedding")
        by_length = sorted(entries("decoder"), key=lambda entry: entry.size("embeds", 1))
        self._step, self._prefill = by_length[0], by_length[-1]
        for entry in by_length:
            names = {parameter.name for parameter in entry.function.inputs}
            if names - {_COUNT, _CONV, _MUTUAL} != _ROWS | set(_CACHES):
                raise BundleError(f"{entry.where} takes {', '.join(sorted(names))}: no decoder")
        self.engine = self._step.package.engine
        super().__init__(capacity=self._step.size(_CACHES[0], -2))
        self.chunk = self._prefill.size("embeds", 1)
        self._carried: dict[str, Array] = {
            parameter.name: np.zeros(parameter.type.sizes, np.float32)
            for parameter in self._step.function.inputs
            if parameter.name in (*_CACHES, _CONV) and not parameter.is_state
        }

    def encode_image(
        self, pixels: npt.NDArray[np.float32], variant: str | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Pixels [1, C, S, S] to embeddings [1, k, width] and indices [1, k]."""
        component = self._bundle.component(_TARGET, "vision", variant=variant)
        outputs = self._vision[component.function or _MAIN].predict({"pixel_values": pixels})
        return outputs["embeds"], outputs["indices"].astype(np.int64)

    def embed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Token ids to embeddings [1, L, width]."""
        ids = np.asarray(token_ids, np.int32)[None]
        size = self._embedding.size("input_ids", 1)
        parts = []
        for start in range(0, ids.shape[1], size):
            part = ids[:, start : start + size]
            padded = np.pad(part, ((0, 0), (0, size - part.shape[1])))
            parts.append(self._embedding.predict({"input_ids": padded})["embeds"])
        return np.concatenate(parts, axis=1)[:, : ids.shape[1]]

    def decode(
        self,
        embeds: npt.NDArray[np.float32],
        position_ids: npt.NDArray[np.int64],
        is_visual: npt.NDArray[np.bool_] | None = None,
        mutual: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Runs L rows, writes them to the cache, and returns the last one's logits.

        A prefill writes a whole chunk of rows, padding included; rows after the real ones are
        overwritten by the next call. If a chunk no longer fits into a cache that is a state, rows
        go one by one.
        """
        rows = embeds.shape[1]
        self._require_room(rows)
        logits = np.zeros(0, np.float32)
        done = 0
        while done < rows:
            fits = _CACHES[0] in self._carried or self._length + self.chunk <= self.capacity
            count = min(self.chunk, rows - done) if fits else 1
            if mutual is not None and done + count < rows:
                count = whole_rows(mutual[done:], count)
                if count == 0:
                    raise InputError(
                        f"row {done} of the prompt sees rows that come more than {self.chunk} "
                        "later or find no room in the cache: ask something shorter, or make the "
                        "bundle with a larger chunk"
                    )
            part = slice(done, done + count)
            numbers = None if mutual is None else mutual[part]
            logits = self._run(embeds[:, part], position_ids[:, part], numbers)
            self._advance(count)
            done += count
        return logits

    def _states(self) -> States:
        return {name: state for name, state in self._carried.items() if name == _CONV}

    def _run(
        self,
        embeds: npt.NDArray[np.float32],
        position_ids: npt.NDArray[np.int64],
        mutual: npt.NDArray[np.int64] | None,
    ) -> npt.NDArray[np.float32]:
        rows = embeds.shape[1]
        entry = self._step if rows == 1 else self._prefill
        padding = entry.size("embeds", 1) - rows
        inputs: dict[str, Array] = {
            "embeds": np.pad(embeds, ((0, 0), (0, padding), (0, 0))),
            "position_ids": np.pad(position_ids, ((0, 0), (0, padding))).astype(np.int32),
            "past_length": np.array([self._length], np.int32),
            **self._carried,
        }
        taken = {parameter.name for parameter in entry.function.inputs}
        if _COUNT in taken:
            inputs[_COUNT] = np.array([rows], np.int32)
        if _MUTUAL in taken:
            numbers = np.full(rows, -1) if mutual is None else mutual
            padded = np.pad(numbers, (0, padding), constant_values=-1)
            inputs[_MUTUAL] = padded[None].astype(np.int32)
        outputs = entry.predict(inputs)
        for name in self._carried:
            found = outputs[f"{name}_out"]
            self._carried[name] = found if name in _CACHES else found.copy()
        logits: npt.NDArray[np.float32] = outputs["logits"][0, -1]
        return logits


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One function of an opened package."""

    package: ComputedPackage
    function: Function

    @classmethod
    def open(cls, component: Component, package: ComputedPackage) -> _Entry:
        """The function that a component names.

        Raises:
            BundleError: Its inputs, states or outputs are not those that the manifest names.
        """
        function = package.described.function(component.function or _MAIN)
        entry = cls(package=package, function=function)
        for kind, said, found in (
            ("inputs", component.inputs, {p.name for p in function.inputs if not p.is_state}),
            ("states", component.states, {p.name for p in function.inputs if p.is_state}),
            ("outputs", component.outputs, set(function.outputs)),
        ):
            odd = {signature.name for signature in said} ^ found
            if odd:
                raise BundleError(
                    f"{entry.where}: has the {kind} {', '.join(sorted(odd))} that only one of "
                    f"package and manifest knows"
                )
        return entry

    @property
    def where(self) -> str:
        """The function, for a message."""
        return f"{self.package.described.path}, function {self.function.name}"

    def size(self, name: str, axis: int) -> int:
        """Length of an input along an axis.

        Raises:
            BundleError: It has no such input, or its length varies.
        """
        for parameter in self.function.inputs:
            if parameter.name == name:
                size = parameter.type.shape[axis]
                if size is not None:
                    return size
        raise BundleError(f"{self.where}: has no input {name!r} of fixed length")

    def predict(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Computes the function."""
        return self.package.predict(self.function.name, inputs)
