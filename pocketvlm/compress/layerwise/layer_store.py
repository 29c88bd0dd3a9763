"""Finished layers of a run, kept on disk so that an interrupted run resumes after them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketvlm.compress.layerwise.scratch import find_tensors, keep_tensors
from pocketvlm.context import Ranks
from pocketvlm.errors import StorageError
from pocketvlm.weights.form import WeightForm
from pocketvlm.weights.forms import FORMS

__all__ = ["FinishedLayer", "LayerStore"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedLayer:
    """A quantized weight and its line in the report."""

    form: WeightForm
    row: Mapping[str, Any]


class LayerStore:
    """Finished layers of one stage of one run, each in one file that is whole or not there.

    Args:
        folder: Where they are kept; `None` keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def load(self, name: str) -> FinishedLayer | None:
        """The finished layer, or `None` where it has to be made."""
        found = None if self._folder is None else find_tensors(self._path(self._folder, name))
        if found is None:
            return None
        tensors, document = found
        kinds = {form.kind: form for form in FORMS}
        return FinishedLayer(
            form=kinds[document["form"]["kind"]].from_tensors(tensors, document["form"]),
            row=document["row"],
        )

    def save(self, name: str, layer: FinishedLayer) -> FinishedLayer:
        """Writes a layer aside, flushes it and renames it into place.

        Returns:
            The layer as it lies in the file, so that memory holds none that is finished; the same
            layer where nothing is kept.

        Raises:
            StorageError: The disk is full.
        """
        if self._folder is None:
            return layer
        document = {"form": layer.form.to_metadata(), "row": dict(layer.row)}
        keep_tensors(self._path(self._folder, name), layer.form.to_tensors(), document)
        stored = self.load(name)
        return layer if stored is None else FinishedLayer(form=stored.form, row=layer.row)

    def share(self, name: str, ranks: Ranks, owner: int) -> FinishedLayer:
        """A layer that one rank has stored, in the store of every rank.

        Raises:
            RankError: Another process has ended.
            StorageError: The disk is full, or what was written cannot be read.
            ValueError: Nothing is kept here.
        """
        if self._folder is None:
            raise ValueError("processes share finished layers by files; give a scratch folder")
        path = self._path(self._folder, name)
        ranks.spread_file(path, owner)
        layer = self.load(name)
        if layer is None:
            raise StorageError(f"{path}: is damaged; run the command again")
        return layer

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return folder / f"{name[-80:]}-{digest}.safetensors"
