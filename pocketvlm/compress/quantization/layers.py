"""What quantizers share: rows of a weight in pieces, a finished layer, and its place on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pocketvlm.checkpoint import Checkpoint
from pocketvlm.compress.quantization.rules import Assignment
from pocketvlm.weights import FORMS, SparseWeight, WeightForm, keeps_of

__all__ = [
    "FinishedLayer",
    "LayerStore",
    "behind_mask",
    "describe_layer",
    "float_rows",
    "keeps_in",
    "row_chunks",
    "stage_version",
]

_CHUNK_ELEMENTS = 1024 * 1024


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


def describe_layer(assignment: Assignment[Any], form: WeightForm, **figures: Any) -> dict[str, Any]:
    """The line of a layer in the report, as JSON values."""
    linear, rule = assignment.linear, assignment.rule
    return {
        "name": linear.name,
        "part": linear.part,
        "role": linear.role,
        "block": linear.block,
        "method": "none",
        "bits": None,
        "group_size": None,
        "grid": "float",
        **({} if rule is None else rule.describe(linear)),
        "bits_per_weight": form.bits_per_weight,
        "stored_bytes": form.stored_bytes,
        "sparsity": 1 - form.density if isinstance(form, SparseWeight) else 0.0,
        "reason": assignment.reason,
        **figures,
    }


def row_chunks(form: WeightForm) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight in float64, as many at a time as working memory should hold."""
    rows, columns = form.shape
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        chosen = slice(start, min(start + step, rows))
        dense = form.take_rows(torch.arange(chosen.start, chosen.stop))
        yield chosen, dense.to(torch.float64)


def keeps_in(form: WeightForm, rows: slice) -> Tensor | None:
    """Which elements of some rows a mask keeps, bool [rows, columns]; `None` without a mask."""
    if isinstance(form, SparseWeight):
        return form.keeps(torch.arange(rows.start, rows.stop))
    return None


def behind_mask(form: WeightForm, weight: WeightForm) -> WeightForm:
    """What was made of a weight, behind the weight's own mask where it has one.

    Raises:
        UnsupportedError: Elements of the form cannot be stored one by one.
    """
    keeps = keeps_of(weight)
    return form if keeps is None else SparseWeight.from_form(form, keeps)


def stage_version() -> str:
    """Version of pocketvlm, for stage records."""
    return metadata.version("pocketvlm")


def float_rows(
    assignments: tuple[Assignment[Any], ...], checkpoint: Checkpoint
) -> list[dict[str, Any]]:
    """Lines of the layers that stay as they are, with why."""
    return [
        describe_layer(item, checkpoint.form(item.linear.name))
        for item in assignments
        if item.rule is None
    ]
