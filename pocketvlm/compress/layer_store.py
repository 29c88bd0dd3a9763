"""Finished layers of a run, kept on disk so that a run that was killed goes on behind them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pocketvlm.weights import FORMS, WeightForm

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
        if self._folder is None:
            return None
        path = self._path(self._folder, name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (no mapping)
                document = json.loads(file.metadata()["layer"])
            kind = next(form for form in FORMS if form.kind == document["form"]["kind"])
            return FinishedLayer(
                form=kind.from_tensors(tensors, document["form"]), row=document["row"]
            )
        except (SafetensorError, OSError, KeyError, ValueError, StopIteration):
            # A disk that lost power keeps names without content: the layer is made again.
            return None

    def save(self, name: str, layer: FinishedLayer) -> None:
        """Writes a layer aside, flushes it and renames it into place."""
        if self._folder is None:
            return
        path = self._path(self._folder, name)
        aside = path.with_suffix(".partial")
        document = {"form": layer.form.to_metadata(), "row": dict(layer.row)}
        save_file(layer.form.to_tensors(), aside, metadata={"layer": json.dumps(document)})
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return folder / f"{name[-80:]}-{digest}.safetensors"
